"""Masks from text-to-mask models: the real classes of transformers, tiny and random, against calling them directly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Sam3Config,
    Sam3Model,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    SwinConfig,
)

from sae_lens_multimodal.autointerp.explanation import Explanation
from sae_lens_multimodal.autointerp.mask_files import LIST, FolderMasks
from sae_lens_multimodal.autointerp.measures import measure
from sae_lens_multimodal.autointerp.scorers.masks import MaskScorer
from sae_lens_multimodal.autointerp.segmenters import GroundedSamSegmenter, Sam3Segmenter, noun_phrase
from sae_lens_multimodal.errors import ModelLoadError, StoreError
from sae_lens_multimodal.features.store import FeatureStore
from sae_lens_multimodal.scenes.world import make_scene
from tests.autointerp.sample import COLOURS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "red", "green", "blue", "yellow", "circle"]
SEED = 6
"""Of weights with which SAM finds neither nothing nor all."""
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("explanation", "phrase"),
    [
        ("red", "red"),
        ("Wheels of cars and bicycles.", "wheels of cars and bicycles"),
        ("The unit fires on regions showing a yellow school bus, seen from the side.", "yellow school bus"),
        ("It responds to the presence of text such as signs", "text"),
        ("Dogs that are running (mostly outdoors)", "dogs"),
        ('"pictures of an airplane"', "airplane"),
        ("one two three four five six seven eight nine ten", "one two three four five six seven eight"),
        ("The theatre", "theatre"),
        ("Anything", "anything"),
        ("!?", ""),
        (". . .", ""),
        ("", ""),
    ],
)
def test_an_explanation_becomes_what_a_segmenter_understands(explanation: str, phrase: str) -> None:
    assert noun_phrase(explanation) == phrase


def small(**more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 1, "num_attention_heads": 2, **more}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints, written and read as real ones are."""
    folder = tmp_path_factory.mktemp("segmenters")
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_indices=[2, 3, 4]
    )
    bert = BertConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, **small())
    config = GroundingDinoConfig(
        backbone_config=swin.to_dict(),
        text_config=bert.to_dict(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        max_text_len=16,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder / "dino")
    pictures = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 144})
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder / "dino")
    sam = SamModel(
        SamConfig(
            vision_config=small(
                hidden_size=16,
                output_channels=8,
                image_size=32,
                patch_size=4,
                mlp_dim=16,
                window_size=2,
                global_attn_indexes=[0],
                num_pos_feats=4,
            ),
            prompt_encoder_config={"hidden_size": 8, "image_size": 32, "patch_size": 4, "mask_input_channels": 4},
            mask_decoder_config=small(hidden_size=8, mlp_dim=16, iou_head_hidden_dim=8),
        )
    )
    torch.manual_seed(SEED)
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sam.save_pretrained(folder / "sam")
    SamProcessor(SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})).save_pretrained(
        folder / "sam"
    )
    return {name: folder / name for name in ("dino", "sam")}


@pytest.fixture(scope="module")
def grounded(folders: dict[str, Path]) -> GroundedSamSegmenter:
    return GroundedSamSegmenter.load(folders["dino"], folders["sam"], box_threshold=0.0)


@torch.no_grad()
def test_boxes_are_those_of_the_detector_in_pixels_of_the_picture(grounded: GroundedSamSegmenter) -> None:
    inputs = grounded.detector_processor(images=PICTURE, text="red circle.", return_tensors="pt")
    output = grounded.detector(**inputs)
    scores = output.logits[0].sigmoid().amax(-1)
    x, y, width, height = output.pred_boxes[0].unbind(-1)
    corners = torch.stack([60 * (x - width / 2), 40 * (y - height / 2), 60 * (x + width / 2), 40 * (y + height / 2)], 1)
    expected = corners.clamp(min=torch.zeros(4), max=torch.tensor([60.0, 40.0, 60.0, 40.0])).numpy()
    np.testing.assert_allclose(grounded.boxes(PICTURE, "red circle"), expected, atol=1e-4)
    middle = float(scores.median())
    some = GroundedSamSegmenter(*parts(grounded), name="some", box_threshold=middle)
    np.testing.assert_allclose(some.boxes(PICTURE, "red circle"), expected[(scores > middle).numpy()], atol=1e-4)


def parts(segmenter: GroundedSamSegmenter) -> tuple[Any, Any, Any, Any]:
    return segmenter.detector, segmenter.detector_processor, segmenter.segmenter, segmenter.segmenter_processor


@torch.no_grad()
def test_the_mask_is_all_boxes_filled_by_sam(grounded: GroundedSamSegmenter) -> None:
    expected = np.zeros((40, 60), dtype=bool)
    for box in grounded.boxes(PICTURE, "red circle").tolist():
        inputs = grounded.segmenter_processor(images=PICTURE, input_boxes=[[box]], return_tensors="pt")
        output = grounded.segmenter(
            pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=False
        )
        square = interpolate(output.pred_masks[0], (32, 32), mode="bilinear", align_corners=False)
        height, width = inputs["reshaped_input_sizes"][0].tolist()
        whole = interpolate(square[..., :height, :width], (40, 60), mode="bilinear", align_corners=False)
        expected |= (whole[0, 0] > 0).numpy()
    found = grounded.segment(PICTURE, "red circle")
    assert 0.05 < found.mean() < 0.95
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_found_is_an_empty_mask_and_what_names_nothing_is_unknown(
    grounded: GroundedSamSegmenter, store: FeatureStore
) -> None:
    nothing = GroundedSamSegmenter(*parts(grounded), name="strict", box_threshold=1.0)
    example = store.examples(0, "top", "image")[0]
    found = nothing("red", example, 0)
    assert found is not None
    assert (found.shape, found.any()) == ((example.images[0].height, example.images[0].width), False)
    assert nothing(". . .", example, 0) is None
    assert "box threshold 1" in nothing.source


def test_a_segmenter_is_measured_with(grounded: GroundedSamSegmenter, store: FeatureStore, tmp_path: Path) -> None:
    explained = [Explanation(feature=feature, text=colour) for feature, colour in enumerate(COLOURS[:2])]
    found = measure(
        store,
        explained,
        [MaskScorer(grounded, source=grounded.source, n_items=2)],
        output=tmp_path / "out",
        progress=False,
    )
    assert all(one.found.n == 2 and one.found.n_failed == 0 and 0 <= one.found.values["iou"] < 1 for one in found)
    assert "Grounding DINO and SAM" in (tmp_path / "out" / "manifest.json").read_text()


def test_other_models_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a model of type 'sam'; expected Grounding DINO"):
        GroundedSamSegmenter.load(folders["sam"], folders["sam"])
    with pytest.raises(ModelLoadError, match="expected SAM or SAM 2"):
        GroundedSamSegmenter.load(folders["dino"], folders["dino"])
    with pytest.raises(ModelLoadError, match="expected SAM 3"):
        Sam3Segmenter.load(folders["sam"])
    with pytest.raises(ModelLoadError, match="expected a checkpoint of transformers"):
        Sam3Segmenter.load(tmp_path)


@pytest.fixture(scope="module")
def sam3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sam3")
    letters = [chr(code) for code in range(97, 123)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    part = small(hidden_size=32, intermediate_size=32)
    layers = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = {
        **part,
        "model_type": "sam3_vit_model",
        "image_size": 112,
        "pretrain_image_size": 56,
        "window_size": 4,
        "global_attn_indexes": [0],
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }
    text = {
        **part,
        "vocab_size": 54,
        "max_position_embeddings": 32,
        "projection_dim": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    config = Sam3Config(
        vision_config=vision,
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_layers": 2, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    Sam3Model(config).save_pretrained(folder)
    pictures = {
        "image_processor_type": "Sam3ImageProcessor",
        "size": {"height": 112, "width": 112},
        "mask_size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Sam3Processor", "image_processor": pictures})
    )
    return folder


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_sam_3_says_that_it_needs_torchvision(sam3_folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="its processor needs torchvision: pip install torchvision"):
        Sam3Segmenter.load(sam3_folder)


def probabilities(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each instance, and of its pixels in the picture: as SAM 3 is published."""
    scores = output.pred_logits[0].sigmoid() * output.presence_logits[0].sigmoid()
    pixels = interpolate(output.pred_masks.sigmoid(), (40, 60), mode="bilinear", align_corners=False)[0]
    return scores, pixels


class _WithoutTorchvision:
    """SAM 3's processor in Pillow, for machines without torchvision."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.texts: list[str] = []

    def __call__(self, *, images: Image.Image, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        self.texts.append(text)
        square = np.asarray(images.resize((112, 112), Image.Resampling.BILINEAR), dtype=np.float32)
        words = self.tokenizer(text, padding="max_length", max_length=32, return_tensors=return_tensors)
        return {"pixel_values": torch.from_numpy(square / 127.5 - 1).permute(2, 0, 1)[None], **words}

    def post_process_instance_segmentation(
        self, output: Any, *, threshold: float, mask_threshold: float, target_sizes: list[tuple[int, int]]
    ) -> list[dict[str, torch.Tensor]]:
        assert target_sizes == [(40, 60)]
        scores, pixels = probabilities(output)
        return [{"masks": (pixels[scores > threshold] > mask_threshold).long()}]


@torch.no_grad()
def test_sam_3_gives_all_instances_together(sam3_folder: Path) -> None:
    model, processor = Sam3Model.from_pretrained(sam3_folder), _WithoutTorchvision(sam3_folder)
    segmenter = Sam3Segmenter(model, processor, name="tiny", threshold=0.0)
    inputs = processor(images=PICTURE, text="red", return_tensors="pt")
    scores, pixels = probabilities(model(**inputs))
    expected = (pixels > 0.5).any(0).numpy()
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(segmenter.segment(PICTURE, "red"), expected)
    segmenter.threshold = float(scores.median())
    kept = (pixels[scores > scores.median()] > 0.5).any(0).numpy()
    np.testing.assert_array_equal(segmenter.segment(PICTURE, "red"), kept)
    segmenter.threshold = 1.0
    assert not segmenter.segment(PICTURE, "red").any()
    segmenter.segment(PICTURE, "many red circles on seven very long sheets")
    assert processor.texts[-1] == "many red circles on seven very long", "as many words as the text encoder takes"


@torch.no_grad()
def test_sam_3_with_its_own_processor(sam3_folder: Path) -> None:
    pytest.importorskip("torchvision")
    from transformers import Sam3Processor

    segmenter = Sam3Segmenter.load(sam3_folder, threshold=0.0)
    processor = Sam3Processor.from_pretrained(sam3_folder)
    output = segmenter.model(**processor(images=PICTURE, text="red", return_tensors="pt").to("cpu"))
    (found,) = processor.post_process_instance_segmentation(output, threshold=0.0, target_sizes=[(40, 60)])
    np.testing.assert_array_equal(segmenter.segment(PICTURE, "red"), found["masks"].bool().any(0).numpy())


def test_given_masks_are_looked_up(store: FeatureStore, tmp_path: Path) -> None:
    lines = []
    examples = {one.prompt_id: one for kind in ("top", "ordinary") for one in store.examples(0, kind, "image")}  # type: ignore[arg-type]
    for number, example in examples.items():
        for place, thing in enumerate(one for one in make_scene(number).objects if one.colour == "red"):
            name = f"{number}-{place}.png"
            Image.fromarray(thing.mask.astype(np.uint8) * 255).save(tmp_path / name)
            lines.append({"explanation": "Red ", "image": example.image_ids[0], "mask": name})
        lines.append({"explanation": "wheels", "image": example.image_ids[0], "mask": None})
    (tmp_path / LIST).write_text("\n".join(map(json.dumps, lines)))
    masks = FolderMasks(tmp_path)
    for number, example in examples.items():
        expected = np.any([one.mask for one in make_scene(number).objects if one.colour == "red"], axis=0)
        np.testing.assert_array_equal(masks("red", example, 0), expected)
        empty = masks("wheels", example, 0)
        assert empty is not None and empty.shape == expected.shape and not empty.any()
        assert masks("blue", example, 0) is None
    explained = [Explanation(feature=0, text="red"), Explanation(feature=1, text="wheels")]
    scorer = MaskScorer(masks, source=masks.source)
    red, _ = measure(store, explained, [scorer], output=tmp_path / "out", progress=False)
    assert red.found.values["iou"] > 0.5 and red.control is not None and red.control.values["iou"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"explanation": "red", "mask": "a.png"}, "line 1: expected"),
        ({"explanation": "red", "image": "x", "mask": 3}, "line 1: expected"),
        (None, "does not exist"),
    ],
)
def test_a_list_of_masks_of_another_shape_is_refused(line: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    if line is not None:
        (tmp_path / LIST).write_text(json.dumps(line))
    with pytest.raises(StoreError, match=message):
        FolderMasks(tmp_path)


def test_masks_that_do_not_fit_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    example = store.examples(0, "top", "image")[0]
    for content, message in ((None, "is no mask"), (Image.new("L", (3, 3)), "give masks of the original picture")):
        if content is not None:
            content.save(tmp_path / "a.png")
        (tmp_path / LIST).write_text(json.dumps({"explanation": "red", "image": example.image_ids[0], "mask": "a.png"}))
        with pytest.raises(StoreError, match=message):
            FolderMasks(tmp_path)("red", example, 0)
