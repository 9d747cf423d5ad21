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
hook = "blocks.0.hook_resid_post"
torch.set_grad_enabled(False)

scene = make_scene(seed=12, n_objects=2)
target = scene.objects[0]
question = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": scene.image},
            {"type": "text", "text": "what is in the picture ?"},
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
# Read activations in a trace: any hook, by TransformerLens's name or by module path, in the order of the forward pass.
with model.trace(**batch):
    patches = model.hooks["vision.blocks.0.hook_resid_post"].save()
    resid = model.hooks[hook].save()
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
# Steering is an nnsight edit: the original model stays as it was, and the SAE's error is kept. On the target's tokens
# only, the features of the target are ablated, or give way to those of the other object.
on_other = batch.layout.tokens_in(Box(*scene.objects[1].box))
foreign = (z[on_other].mean(0) - z[on_target].mean(0)).topk(5).indices.tolist()
without = {int(own): Ablate() for own in top.indices}
mask = torch.zeros_like(batch.layout.is_image)
mask[0, on_target] = True
for name, changes in {
    "strongest feature three times as strong": {feature: Scale(3.0)},
    "features ablated": without,
    "features of the other object instead": {**without, **{one: Set(1.5 * float(z[:, one].max())) for one in foreign}},
}.items():
    print(name, "->", steer(model, sae, changes, tokens=mask).answer([question])[0])
print("original ->", model.answer([question])[0])
