# %% [markdown]
# # Leading questions make the model see what is not there: find the features behind it, and repair it
#
# "there is a red star , right ?" is answered yes where there is a red circle and a blue star. Which features have to be
# ablated or raised for the answer to become no, while right answers stay?

# %%
from dataclasses import replace
from pathlib import Path

from sae_lens import SAE

from sae_lens_multimodal import load_model
from sae_lens_multimodal.demo.run import train_sae
from sae_lens_multimodal.demo.settings import DemoSettings
from sae_lens_multimodal.hooks.controls import SearchSettings, find_controls
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.control_cases import absent_prompts, present_prompts

model = load_model(model_folder())
folder = Path("output/sae-early")
if not folder.exists():
    train_sae(model, replace(DemoSettings(), hook_name="blocks.2.hook_resid_post", training_tokens=200_000), folder)
sae = SAE.load_from_disk(folder)

# %%
# Questions about absent objects, half of which are in the picture, and about objects that are there. Ask more of what
# is to stay than of what is to change: a harm of 2% does not show in 20 answers.
asked = [*absent_prompts("adversarial", first_seed=1000, n=40), *present_prompts(first_seed=5000, n=160)]
answers = model.answer([one.conversation for one in asked], max_new_tokens=2)
wrong = [one for one, answer in zip(asked, answers, strict=True) if one.answer == "no" and answer == "yes"]
right = [one for one, answer in zip(asked, answers, strict=True) if answer == one.answer]
print(len(wrong), "wrong yeses,", len(right), "right answers of", len(asked))

# %%
repair = find_controls(
    model,
    sae,
    [one.conversation for one in wrong],
    wanted="no",
    unwanted="yes",
    guard=[one.conversation for one in right],
    tokens="text",
    steps="prefill",
    settings=SearchSettings(max_new_tokens=2, max_side_effects=0.02),
    progress=True,
)
for one in repair.controls:
    print(f"feature {one.feature}: {one.direction}, {one.strength:g} times its 99th percentile ({one.scale:.2f})")
print("wrong yeses repaired, unseen:", repair.held_out.success)
print("right answers changed, unseen:", repair.held_out.side_effects)

# %%
# On fresh scenes.
if repair.controls:
    steered = repair.steer(model, sae)
    for name, fresh in {
        "absent": absent_prompts("adversarial", first_seed=9000, n=20),
        "present": present_prompts(first_seed=9500, n=40),
    }.items():
        prompts = [one.conversation for one in fresh]
        for what, asked_model in {"before": model, "after": steered}.items():
            said = asked_model.answer(prompts, max_new_tokens=2)
            print(name, what, "yes:", said.count("yes"), "no:", said.count("no"))
