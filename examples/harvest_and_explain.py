# %% [markdown]
# # What do the features respond to, what does a VLM say about them, and is that right?
#
# Run `train_sae.py` first: it leaves the SAE in `output/sae`. Here the tiny model explains and judges itself; any
# OpenAI-compatible server can take its place: `OpenAIJudge("Qwen/Qwen2.5-VL-72B-Instruct", base_url="http://…/v1")`.

# %%
import shutil

from sae_lens import SAE

from sae_lens_multimodal import build_report, explain, harvest, load_model, score
from sae_lens_multimodal.autointerp.judges import CachedJudge, TransformersJudge
from sae_lens_multimodal.autointerp.results import read_verdicts, summarise
from sae_lens_multimodal.scenes import model_folder, scenes_dataset
from sae_lens_multimodal.scenes.prompt_book import scenes_prompt_book

model = load_model(model_folder())
sae = SAE.load_from_disk("output/sae")
for folder in ("features", "explanations", "scores"):  # begin anew; without this, finished work is not done again
    shutil.rmtree(f"output/{folder}", ignore_errors=True)

# %%
# One pass over the data finds the best, ordinary and silent examples of every feature, and its statistics.
store = harvest(model, sae, scenes_dataset(seed=3, count=300), "output/features", batch_size=16)
print(store.statistics.to_pandas().sort_values("density", ascending=False).head())

# %%
# One feature: where does it fire?
feature = int(store.statistics.to_pandas().sort_values("density_image").iloc[-5]["feature"])
for example in store.examples(feature, kind="top", modality="image", limit=3):
    print(example.max_image, example.images[0].size, "".join(f" {token}" for token in example.tokens[-12:]))

# %%
# Explain the twenty most active features. The prompt book holds the phrases; without one they are for models that
# follow instructions.
chosen = store.statistics.to_pandas().sort_values("n_prompts", ascending=False)["feature"].head(20).tolist()
judge = CachedJudge(TransformersJudge(model), "output/answers.sqlite")
explanations = explain(store, judge, output="output/explanations", features=chosen, prompts=scenes_prompt_book())
for explanation in explanations[:10]:
    print(explanation.feature, explanation.modality, repr(explanation.text), explanation.status)

# %%
# Score the explanations on examples that the explainer did not see, beside shuffled explanations.
scores = score(store, judge, explanations, output="output/scores", prompts=scenes_prompt_book())
for line in summarise(scores):
    score_and_control = (line.balanced_accuracy, line.control_balanced_accuracy)
    means = ["-" if interval is None else f"{interval.mean:.2f}" for interval in score_and_control]
    print(line.scorer, line.modality, "score", means[0], "shuffled", means[1], "features", line.n_scored)

# %%
index = build_report(
    store,
    output="output/report",
    explanations=explanations,
    scores=scores,
    verdicts=read_verdicts("output/scores"),
    features=chosen,
)
print("open", index)
