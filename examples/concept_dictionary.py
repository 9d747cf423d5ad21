# %% [markdown]
# # What the states of a word are made of
#
# "Circle" in captions of scenes: the states that predict it are gathered, taken apart into concepts, named, shown,
# measured against what is known of the scenes, and used like SAE features. Nothing has to be run before.

# %%
import torch
from sae_lens import SAE

from sae_lens_multimodal import (
    Add,
    ContinuationLogProbability,
    attribute,
    evaluate_concepts,
    find_concepts,
    gather_states,
    ground_concepts,
    harvest,
    load_model,
    steer,
)
from sae_lens_multimodal.data.rows import row_to_prompt
from sae_lens_multimodal.scenes import model_folder
from sae_lens_multimodal.scenes.concept_truth import caption_rows, concept_truth, shuffled_truth

model = load_model(model_folder(), dtype=torch.float32)
rows = caption_rows(2**46, 300)  # a list of rows; a hub name, a folder or a file will do as well
hook = "blocks.2.hook_resid_post"

# %%
# The states before the word, where it is a whole word of the caption; on disk, and resumed if the run is killed.
states = gather_states(model, rows, "circle", hook_name=hook, every=True, output="output/circle")
print(states.summary())
found_on, measured_on = states.split(0.5)

# %%
# Concepts by Semi-NMF and by baselines, measured on states that they were not found on.
methods = ("semi_nmf", "simple", "random")  # with scikit-learn also "pca" and "kmeans"
dictionaries = {method: find_concepts(found_on, k=12, method=method, seed=0) for method in methods}
print("\n".join(evaluate_concepts(model, dictionaries, measured_on).lines()))
for method, dictionary in dictionaries.items():
    truth, floor = (measure(dictionary, measured_on, rows) for measure in (concept_truth, shuffled_truth))
    print(f"{method}: attributes of the circles are matched {truth.score:.2f}, shuffled {floor.score:.2f}")

# %%
# Their names by the unembedding, and what they really are; where in the pictures the first is.
dictionary = dictionaries["semi_nmf"]
words = dictionary.words(model, 4, contrast=True)
for match in concept_truth(dictionary, measured_on, rows).matches:
    print(match.concept, [word for word, _ in words[match.concept]], "is", match.attribute, f"{match.above_chance:.2f}")
for grounding in ground_concepts(model, dictionary, rows, concepts=[0], n_rows=2)[0]:
    print("row", grounding.row, [tuple(round(edge) for edge in patch.box) for patch in grounding.patches[:3]])

# %%
# A dictionary is an SAE: saved, loaded by SAE-Lens, harvested, steered, and attributed to.
dictionary.save("output/circle-concepts")
sae = SAE.load_from_disk("output/circle-concepts")
store = harvest(model, sae, rows[:40], "output/circle-store", n_top=4, progress=False)
print(len(store.features), "of", store.d_sae, "concepts fired")
question = row_to_prompt(rows[0]).messages[:1]
answer = model.answer([question])[0]
found = attribute(model, sae, question, ContinuationLogProbability(answer.split()[0]))
print(answer, "| rests on concepts", [one.feature for one in found.by_feature()[:3]])
best = concept_truth(dictionary, measured_on, rows).matches[0]
steered = steer(model, sae, {best.concept: Add(float(dictionary.activations[:, best.concept].max()))}, tokens="last")
print("with more of", best.attribute, "->", steered.answer([question])[0])
