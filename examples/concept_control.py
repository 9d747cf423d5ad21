# %% [markdown]
# # Which features make the model say a colour, and does setting them work on pictures that were never seen?
#
# An SAE in the middle of the model is trained first, if there is none in `output/sae-middle`.

# %%
from dataclasses import replace
from pathlib import Path

from sae_lens import SAE

from sae_lens_multimodal import load_model
from sae_lens_multimodal.demo.run import train_sae
from sae_lens_multimodal.demo.settings import DemoSettings
from sae_lens_multimodal.hooks.attribute import attribute
from sae_lens_multimodal.hooks.attribution_check import check_attribution
from sae_lens_multimodal.hooks.controls import SearchSettings, find_controls
from sae_lens_multimodal.hooks.metrics import LogitDifference
from sae_lens_multimodal.report.controls import build_control_report
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.control_cases import attribute_prompts, other_prompts

model = load_model(model_folder())
folder = Path("output/sae-middle")
if not folder.exists():
    train_sae(model, replace(DemoSettings(), hook_name="blocks.3.hook_resid_post", training_tokens=200_000), folder)
sae = SAE.load_from_disk(folder)

# %%
# What does an answer rest on? One forward and one backward pass give the effect of every feature at every token.
asked = attribute_prompts("colour", "red", first_seed=1, n=1)[0]
found = attribute(model, sae, [asked.conversation], LogitDifference(asked.answer, "red"))
print(asked.question, "->", asked.answer, "; red is behind by", round(float(found.values[0]), 2))
for one in found.by_feature()[:5]:
    print(f"feature {one.feature}: {one.effect:+.3f} if ablated, active at {one.n_tokens} tokens")
print("by modality:", {name: round(value, 3) for name, value in found.by_modality().items()})
print("completeness:", found.completeness)
print("over the picture:", found.heatmap(image=0).shape)
check = check_attribution(model, sae, found, n=50)
print("rank correlation with true ablations:", round(check.spearman, 3))

# %%
# Which few features turn the answer into "red", and leave other questions alone?
controls = find_controls(
    model,
    sae,
    [one.conversation for one in attribute_prompts("colour", "red", first_seed=1000, n=32)],
    wanted="red",
    guard=[one.conversation for one in other_prompts("colour", first_seed=2000, n=32)],
    positives=[one.conversation for one in attribute_prompts("colour", "red", first_seed=3000, n=16, having=True)],
    tokens="last",
    steps="prefill",
    settings=SearchSettings(max_new_tokens=2),
    progress=True,
)
for one in controls.controls:
    print(f"feature {one.feature}: {one.direction}, {one.strength:g} times its 99th percentile ({one.scale:.2f})")
print("answers red on unseen pictures:", controls.held_out.success, "; before:", controls.before)
print("other answers changed:         ", controls.held_out.side_effects)
print("pictures on both sides:        ", controls.pictures_shared)
print("random features instead:       ", controls.random and controls.random.success)
print("difference of means instead:   ", controls.mean_difference and controls.mean_difference.success)
for pair in controls.answers[:4]:
    print(f"{pair.prompt} {pair.before} -> {pair.after}")

# %%
# The whole search on a page, with the pictures and answers of the first eight examples and guard examples.
print(build_control_report({"red": controls}, output="controls", n_answers=8))

# %%
# The set is a steered model like any other.
if controls.controls:
    print(controls.steer(model, sae).answer([asked.conversation]))
