# %% [markdown]
# # Interventions: ordinary nnsight, with hook names, token layouts and SAE features
#
# Run `train_sae.py` first: it leaves the SAE in `output/sae`.

# %%
import torch
from sae_lens import SAE

from sae_lens_multimodal import Ablate, Scale, Set, load_model, read_activations, steer
from sae_lens_multimodal.scenes import make_scene, model_folder
from sae_lens_multimodal.types import Box

model = load_model(model_folder())
sae = SAE.load_from_disk("output/sae")
hook = "blocks.2.hook_resid_post"

scene = make_scene(seed=7, n_objects=2)
target = scene.objects[0]
question = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": scene.image},
            {"type": "text", "text": f"what colour is the {target.shape} ?"},
        ],
    }
]
print([thing.phrase for thing in scene.objects], "->", model.answer([question])[0])

# %%
# Where do the tokens lie? The layout knows the modality and the place of every one.
batch = model.encode([question])
print({name: tuple(tensor.shape) for name, tensor in batch.items()})
on_target = batch.layout.tokens_in(Box(*target.box))
print(len(on_target), "tokens lie on the", target.phrase)

# %%
# Read activations in a trace: any hook, by TransformerLens's name or by module path.
with model.trace(**batch):
    resid = model.hooks[hook].save()
    patches = model.hooks["vision.blocks.0.hook_resid_post"].save()
print(tuple(resid.shape), tuple(patches.shape))

# %%
# Which features fire on the object, and not elsewhere in the picture?
z = sae.encode(read_activations(model, batch, hook)[hook][0])
elsewhere = batch.layout.is_image[0].clone()
elsewhere[on_target] = False
difference = z[on_target].mean(0) - z[elsewhere].mean(0)
top = difference.topk(5)
print({int(feature): round(float(value), 2) for feature, value in zip(top.indices, top.values, strict=True)})

# %%
# Write activations: add a feature's direction to the object's tokens.
feature = int(top.indices[0])
with model.trace(**batch):
    resid = model.hooks[hook]
    resid[:, on_target] += 4.0 * sae.W_dec[feature]
    model.hooks[hook] = resid
    logits = model.output.logits.save()
print("top token:", model.token_strings(logits[0, -1].topk(1).indices)[0])

# %%
# Several pictures in one trace: every invoke sees its own rows.
other = [{"role": "user", "content": [{"type": "image", "image": make_scene(8).image}, {"type": "text", "text": "?"}]}]
with model.trace() as tracer:
    with tracer.invoke(**batch):
        first = model.hooks[hook].save()
    with tracer.invoke(**model.encode([other])):
        second = model.hooks[hook].save()
print(tuple(first.shape), tuple(second.shape))

# %%
# Steering is an nnsight edit: the original model stays as it was, and the SAE's error is kept.
for change in (Ablate(), Scale(3.0), Set(2 * float(z.max()))):
    mask = torch.zeros_like(batch.layout.is_image)
    mask[0, on_target] = True
    steered = steer(model, sae, {feature: change}, tokens=mask)
    print(change, "->", steered.answer([question])[0])
print("original ->", model.answer([question])[0])
