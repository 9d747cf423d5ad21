# %% [markdown]
# # Causal tracing: from an answer to the layer and token that hold it, and to the features there
#
# Run `train_sae.py` first, with `hook_name="blocks.4.hook_resid_post"`: it leaves the SAE in `output/sae`. One at layer
# 0 works too, but there the answer has not yet left the word that names the object, and its features bring little back.

# %%
import torch
from sae_lens import SAE

from sae_lens_multimodal import (
    BlankRegion,
    BoxTokens,
    HeldOut,
    ablate_tokens,
    attention_contributions,
    build_trace_report,
    causal_trace,
    knock_out,
    load_model,
    logit_lens,
    read_activations,
    trace_features,
)
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.constraints import constraint_cases, twin

model = load_model(model_folder())
sae = SAE.load_from_disk("output/sae")
torch.set_grad_enabled(False)

# %%
# A question about one of two objects. Its constraints are marked: a word that stands for something in the picture, and
# one that stands for itself. The counterfactual asks the same of the other object, whose answer differs.
case = constraint_cases(1)[0]
print([thing.phrase for thing in case.scene.objects])
print(case.clean.question, "->", case.clean.answer, "|", case.counterfactual.question, "->", case.counterfactual.answer)
for constraint, places in zip(case.clean.constraints, case.clean.positions(model.family), strict=True):
    print(constraint.text, constraint.kind, places)
word = case.word_positions(model.family)

# %%
# The object painted over. Where do its clean values bring the answer back? Early at its own patches, then at the word
# that names it, at last where the answer begins.
blanked = causal_trace(
    model,
    case.clean.conversation,
    BlankRegion(case.box),
    answer=case.clean.answer,
    parts="resid",
    positions={"the object": BoxTokens(case.box), "its word": word, "the end": "last"},
)
print(blanked.clean["probability"], "->", blanked.corrupted["probability"])
for layer, shares in zip(blanked.layers, blanked.part("resid").tolist(), strict=True):
    print(layer, {unit.label: round(share, 2) for unit, share in zip(blanked.units, shares, strict=True)})

# %%
# The same from attention's side: what the object's patches give to the word that names it, layer by layer.
contributions = attention_contributions(model, case.clean.conversation, targets=word)
regions = {"the object": contributions.layout.tokens_in(case.box)}
print(contributions.by_region(regions)["the object"][:, 0])

# %%
# And what becomes of the answer where the word may no longer look at the picture, in the first layers or the last; and
# where the object's patches all carry their mean.
for layers in ((0, 1, 2), (3, 4, 5)):
    print(layers, knock_out(model, "image", word, layers=layers).answer([case.clean.conversation]))
print(ablate_tokens(model, BoxTokens(case.box)).answer([case.clean.conversation]))

# %%
# What the patches would say at each layer.
lens = logit_lens(model, case.clean.conversation, words=(str(case.clean.answer),), positions="image")
print([float(lens.heatmap(str(case.clean.answer), layer).max()) for layer in lens.layers])

# %%
# Joined up: the hottest cell that the SAE reads, leaving out the word that the corruption replaced; its features there,
# with what they stand for (from `read_explanations`, after autointerp; here from the colours they are active on), and
# whether ablating or exchanging them takes the answer away: also in another scene with the same things, which had no
# part in choosing them. Put at their means over the same kind of question about other scenes they say nothing of any
# answer, and leave the model where it usually is; the whole value at its mean is the most that can be lost there.
explanations = {}
for colour in {one.colour for one in case.scene.objects}:
    prompt = [{"role": "user", "content": [{"type": "text", "text": f"the {colour} thing"}]}]
    states = model.encode(prompt)
    values = read_activations(model, states, sae.cfg.metadata.hook_name)[sae.cfg.metadata.hook_name]
    for feature in sae.encode(values)[0].max(0).values.topk(3).indices.tolist():
        explanations[feature] = (
            f"{explanations[feature]}, {colour}" if feature in explanations else f"the word {colour}"
        )
picture = twin(case).image
pair = [
    [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": one.question}]}]
    for one in (case.clean, case.counterfactual)
]
asked = case.clean.constraints[0].text
reference = [one.clean.conversation for one in constraint_cases(80)[1:] if one.clean.constraints[0].text == asked]
story = trace_features(
    model,
    sae,
    case.clean.conversation,
    case.counterfactual.conversation,
    answer=case.clean.answer,
    against=case.counterfactual.answer,
    explanations=explanations,
    held_out=[HeldOut(*pair)],
    reference=reference,
)
print(story.cell, story.hottest)
for one in story.features:
    print(one.feature, one.clean, one.corrupted, one.explanation)
print("brought back:", story.together.restored, "of", story.restored_all)
for found in (story.together, *story.held_out):
    print("lost where ablated:", found.ablated, "exchanged:", found.exchanged)
    print("random features of like weight:", found.ablated_random, found.exchanged_random)
    print("at their means:", found.mean_ablated)

# %%
page = build_trace_report(
    {case.clean.question: story, "the object painted over": blanked},
    output="output/trace",
    pictures={case.clean.question: case.scene.image, "the object painted over": case.scene.image},
)
print(page)
