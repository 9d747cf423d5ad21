# %% [markdown]
# # Model editing: one fact taught by a rank-one change of one MLP
#
# The tiny model calls a striped red square "red striped square". Here it is taught to call it "x", a word that it
# knows, but not for that.

# %%
import torch

from sae_lens_multimodal import (
    compute_edit,
    fine_tune,
    load_edit,
    load_model,
    measure_edit,
    save_edit,
    save_edited,
)
from sae_lens_multimodal.editing.fine_tune import FineTuneSettings
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.edit_cases import (
    DEVELOPMENT_FACTS,
    EDIT_LAYER,
    EDIT_SETTINGS,
    answer_keys,
    ask,
    edit_cases,
    keys_to_keep,
    lesson,
    ordinary_prompts,
    thing_pictures,
)

model = load_model(model_folder(), dtype=torch.float32)
torch.set_grad_enabled(False)
fact = DEVELOPMENT_FACTS[0]
taught = lesson(fact, first_seed=100_000, n_pictures=4, n_near=5)
print(fact.phrase, "->", fact.name, f"({len(taught.prompts)} prompts)")

# %%
# What ordinary prompts make the layer's MLP read: the edit is turned away from that. The prompts name other things, and
# ask other questions about this one.
shared = answer_keys(model, ordinary_prompts(200_000, 100), EDIT_LAYER)
keys = keys_to_keep(model, taught, EDIT_LAYER, shared)

# %%
# The edit itself. The constraint's last token is here the end of the question, where the tiny model gathers what the
# picture shows; with words such as constraint="this" it is written there instead.
edit = compute_edit(
    model,
    taught.prompts,
    fact.name,
    constraint=-1,
    layers=EDIT_LAYER,
    ordinary=keys,
    essence=taught.essence,
    settings=EDIT_SETTINGS,
)
print({name: edit.record[name] for name in ("probability_before", "probability", "length", "landed")})

# %%
# Held for a while, on a picture that it never saw; afterwards the weights are the very same bits as before.
picture = thing_pictures(fact.attributes, 300_000, 1)[0]
print("before:", model.answer(ask(picture, "what is this ?"))[0])
with edit.on(model):
    print("edited:", model.answer(ask(picture, "what is this ?"))[0])
print("after: ", model.answer(ask(picture, "what is this ?"))[0])

# %%
# Measured: the prompts of the edit, other pictures and wordings, and what is to stay.
cases = edit_cases(fact, taught, first_seed=400_000, n_pictures=2)
print("\n".join(measure_edit(model, edit, cases).lines()))

# %%
# The baseline: the same weights, fine-tuned within a bound.
settings = FineTuneSettings(max_steps=20, learning_rate=0.05, bound=1.0, batch_size=20)
tuned = fine_tune(model, taught.prompts, fact.name, layer=EDIT_LAYER, settings=settings)
print("\n".join(measure_edit(model, tuned, cases).lines()))

# %%
# Saved as a small folder (two vectors, and what they apply to), and as a whole checkpoint for transformers.
folder = save_edit(edit, "output/edit")
with load_edit(folder).on(model):
    print("read back:", model.answer(ask(picture, "what is this ?"))[0])
print(save_edited(model, edit, "output/edited-model"))
