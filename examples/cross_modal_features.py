# %% [markdown]
# # Features that mean the same in pictures and in words
#
# A feature is cross-modal if it fires on what a picture shows and on the words for it. In the tiny model's world both
# are known: the objects' masks and the words that name them. How many such features are there, layer by layer?

# %%
from pathlib import Path

from sae_lens import TopKTrainingSAEConfig

from sae_lens_multimodal import MultimodalSAERunnerConfig, MultimodalSAETrainingRunner, load_model
from sae_lens_multimodal.features.cross_modal import cross_modal_features
from sae_lens_multimodal.features.harvest import harvest
from sae_lens_multimodal.scenes import model_folder, scene_rows, scenes_dataset
from sae_lens_multimodal.scenes.cross_modal import cross_modal_lines, cross_modal_truth
from sae_lens_multimodal.scenes.truth import fit_features
from sae_lens_multimodal.training.plot import line_charts

TRAINING_TOKENS = 200_000
OUTPUT = Path("output/cross_modal")

# %%
model = load_model(model_folder())


def train(hook: str):  # noqa: ANN201
    cfg = MultimodalSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=model.d_model, d_sae=256, k=8),
        model_name=str(model_folder()),
        hook_name=hook,
        dataset_path="sae_lens_multimodal.scenes",
        token_shares={"image": 0.5, "text": 0.5},
        training_tokens=TRAINING_TOKENS,
        train_batch_size_tokens=2048,
        store_batch_size_prompts=32,
        n_batches_in_buffer=16,
        n_eval_batches=0,
        lr=3e-3,
        dead_feature_window=20,
        checkpoint_path=None,
        output_path=str(OUTPUT / hook),
        overwrite=True,
        progress=False,
    )
    rows = scenes_dataset(seed=1, count=1_000_000, kinds=("scene", "text", "text"))
    return MultimodalSAETrainingRunner(cfg, override_dataset=rows, override_model=model).run()


# %%
# One SAE a layer. Both sides must fit the same concept; the floor: each concept is given another one's words.
scenes = list(scene_rows(seed=2, count=200, kinds=("scene", "text")))
strict, loose, chance, saes = [], [], [], {}
for layer in range(model.n_layers):
    hook = f"blocks.{layer}.hook_resid_post"
    saes[layer] = train(hook)
    truth = fit_features(model, saes[layer], scenes, hook_name=hook, batch_size=32)
    found, weaker = cross_modal_truth(truth), cross_modal_truth(truth, min_fit=0.25)
    strict.append((layer, found.share))
    loose.append((layer, weaker.share))
    chance.append((layer, weaker.by_chance))
    print(
        f"layer {layer}: {found.n_live} live features, {found.n_both} fire on both modalities; cross-modal "
        f"{found.share:.1%} (fit .5), {weaker.share:.1%} (fit .25), {weaker.by_chance:.1%} by chance"
    )
    if weaker.found:
        print("\n".join(cross_modal_lines(weaker)[:8]))

# %%
OUTPUT.mkdir(parents=True, exist_ok=True)
lines = {"fit .5": strict, "fit .25": loose, "fit .25, words exchanged": chance}
plot = line_charts({"share of live features that are cross-modal": lines}, x_label="layer")
(OUTPUT / "cross_modal.svg").write_text(plot)
print(f"plot: {OUTPUT / 'cross_modal.svg'}")

# %%
# Without known truth, a feature store has what is needed. Do the words that a feature fires on stand beside the
# pictures that it fires on, oftener than beside others?
best = max(loose, key=lambda point: point[1])[0]
rows = scenes_dataset(seed=3, count=300, kinds=("scene",))
store = harvest(model, saes[best], rows, OUTPUT / f"features-{TRAINING_TOKENS}-{best}", batch_size=32, progress=False)
for row in cross_modal_features(store)[:8]:
    words = ", ".join(f"{word} {share:.0%}" for word, share in row.words)
    print(f"feature {row.feature}: {words}; beside its pictures {row.agreement:.0%}, beside others {row.floor:.0%}")
