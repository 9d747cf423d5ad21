# %% [markdown]
# # Steering: where, when, how strongly, and with what beside it
#
# Run `train_sae.py` first: it leaves the SAE in `output/sae`.

# %%
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_multimodal import (
    Ablate,
    Add,
    BoxTokens,
    ImageTokens,
    Set,
    build_dose_report,
    dose_response,
    load_model,
    read_activations,
    run_with_cache_with_saes,
    steer,
    steering_vector,
)
from sae_lens_multimodal.hooks.dose import activation_unit
from sae_lens_multimodal.scenes import make_scene, model_folder
from sae_lens_multimodal.scenes.world import Scene
from sae_lens_multimodal.types import Box

model = load_model(model_folder())
sae = SAE.load_from_disk("output/sae")
hook = "blocks.0.hook_resid_post"
torch.set_grad_enabled(False)


def ask(scene: Scene, question: str = "what is in the picture ?") -> list[dict[str, Any]]:
    content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


scene, another = make_scene(seed=12, n_objects=2), make_scene(seed=8, n_objects=2)
target = scene.objects[0]
print([thing.phrase for thing in scene.objects], "->", model.answer(ask(scene))[0])

# %%
# A feature that fires on the first object, in the box of it, and how strong it gets by itself.
batch = model.encode([ask(scene)])
on_target = batch.layout.tokens_in(Box(*target.box))
z = sae.encode(read_activations(model, batch, hook)[hook][0])
feature = int((z[on_target].mean(0) - z.mean(0)).argmax())
unit = activation_unit(model, sae, feature, [ask(scene), ask(another)])
print("feature", feature, "reaches", round(unit, 2))

# %%
# Where: everywhere, in one picture, in a box of it (pixels of the original). When: all passes, or a range of them.
for name, options in {
    "everywhere": {},
    "in the first picture": {"tokens": ImageTokens(0)},
    "in the object's box": {"tokens": BoxTokens(tuple(target.box))},
    "while the first two words are read": {"steps": range(1, 3)},
}.items():
    print(name, "->", steer(model, sae, {feature: Set(3 * unit)}, **options).answer(ask(scene))[0])

# %%
# A batch whose rows are steered differently: one mapping for each row.
rows = [{}, {feature: Ablate()}, {feature: Set(3 * unit)}]
print(steer(model, sae, rows).answer([ask(scene)] * 3))

# %%
# Dose and response: many strengths in one batched forward pass. Strengths are in units of the feature's own
# activation; with a `FeatureStore`, `unit=store`. The guard prompts are to stay as they are.
question = f"is there a {target.phrase} ?"
curve = dose_response(model, sae, feature, ask(scene, question), "no", unit=unit, guard=[ask(another)], tokens="image")
for point in curve.points:
    print(f"{point.strength:5.2f}  P(no) {point.target:.3f}  guard moves {point.guard_kl:.4f} nats")

# %%
# A baseline: the difference of means between prompts with and without something, steered just like a feature.
few, many = ([ask(make_scene(seed, n_objects=n)) for seed in range(20)] for n in (1, 3))
vector = steering_vector(model, many, few, hook, tokens="image", name="many objects")
print(vector.name, "->", steer(model, vector, Add(2.0), tokens="image").answer(ask(scene))[0])
baseline = dose_response(model, vector, 0, ask(scene, question), "no", kind="add", guard=[ask(another)], tokens="image")
print(build_dose_report([curve, baseline], output="output/doses"))

# %%
# SAE-Lens's own spelling: the SAE spliced into the model, its activations in a cache.
logits, cache = run_with_cache_with_saes(model, **batch, saes=[sae], use_error_term=True)
print(tuple(logits.shape), tuple(cache[f"{hook}.hook_sae_acts_post"].shape))
