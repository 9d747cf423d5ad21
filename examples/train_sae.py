# %% [markdown]
# # Train a sparse autoencoder on image and text tokens
#
# On the tiny LLaVA-NeXT that ships with the package, and on synthetic scenes. For a real model change `model_name`,
# `hook_name`, `dataset_path` and the sizes: see `configs/llava_next_8b.yaml`.

# %%
from sae_lens import SAE, TopKTrainingSAEConfig

from sae_lens_multimodal import MultimodalSAERunnerConfig, MultimodalSAETrainingRunner, load_model
from sae_lens_multimodal.data.stream import read_prompts
from sae_lens_multimodal.scenes import model_folder, scene_rows, scenes_dataset
from sae_lens_multimodal.training.evaluate import evaluate_reconstruction

# %%
model = load_model(model_folder())

# The configuration is SAE-Lens's, with a few fields more. `token_shares` is exact in every batch.
cfg = MultimodalSAERunnerConfig(
    sae=TopKTrainingSAEConfig(d_in=model.d_model, d_sae=256, k=8),
    model_name=str(model_folder()),
    hook_name="blocks.0.hook_resid_post",
    dataset_path="sae_lens_multimodal.scenes",
    token_shares={"image": 0.6, "text": 0.4},
    training_tokens=200_000,
    train_batch_size_tokens=2048,
    store_batch_size_prompts=16,
    n_batches_in_buffer=16,
    n_eval_batches=0,
    lr=3e-3,
    dead_feature_window=20,
    checkpoint_path=None,
    output_path="output/sae",
    overwrite=True,
)

# %%
# A dataset on the hub would be named by `dataset_path`; this one is made as it is read.
rows = scenes_dataset(seed=1, count=1_000_000, kinds=("scene", "text", "text"))
MultimodalSAETrainingRunner(cfg, override_dataset=rows, override_model=model).run()

# %%
# What was saved is a plain SAE-Lens SAE.
sae = SAE.load_from_disk("output/sae")
print(sae.cfg.architecture(), sae.cfg.metadata.hook_name)

# %%
# How well does it reconstruct scenes that it never saw? Image and text tokens are reported apart.
unseen = read_prompts(list(scene_rows(seed=2, count=60)))
for modality, numbers in evaluate_reconstruction(model, sae, unseen).items():
    print(modality, {name: round(value, 3) for name, value in numbers.items()})
