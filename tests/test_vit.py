"""The model group's vision transformers: architecture, weights from files, preprocessing against torchvision and timm."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from velora.config.model import ViT
from velora.config.parts import Head
from velora.errors import ConfigError
from velora.models.images import ImageTransform
from velora.nn.image_classifier import ImageClassifier

HEAD = Head("image_classification", num_labels=5)
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
KEYS = {
    "kind": "vit", "name": "vit_tiny", "path": None, "pretrained": False, "roles": None,
    "timm_name": "vit_tiny_patch16_224.augreg_in21k", "image_size": 16, "drop_path": 0.0, "normalization": "timm",
    "split_qkv": False, "overrides": SMALL,
}  # fmt: skip


def vit(**changes) -> ViT:
    return ViT.model_validate(KEYS | changes)


def build(model: ViT, seed: int = 0) -> nn.Module:
    return model.build(HEAD, None, SimpleNamespace(seed=seed))


def test_loss_and_logits_are_those_of_timm():
    model = build(vit()).eval()
    assert isinstance(model, ImageClassifier)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=5, **SMALL).eval()
    theirs.load_state_dict(model.vit.state_dict())
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 2])
    output = model(pixel_values=images, labels=labels)
    assert torch.equal(output.logits, theirs(images))
    assert torch.equal(output.loss, nn.CrossEntropyLoss()(theirs(images), labels))
    assert model(images).loss is None


def test_the_seed_decides():
    first, same, other = build(vit()), build(vit()), build(vit(), seed=1)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.vit.head.weight, other.vit.head.weight)


def test_architectures():
    base = vit(overrides={}, image_size=224, timm_name="vit_base_patch16_224.orig_in21k", drop_path=0.1)
    with torch.device("meta"):
        model = build(base)
    # ViT-B/16 without head: 85.8 million (Dosovitskiy et al., Table 1: 86M)
    assert sum(p.numel() for n, p in model.named_parameters() if ".head." not in n) == 85_798_656
    assert model.vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_half_precision_weights_take_float32_images():
    model = build(vit()).to(torch.bfloat16)
    output = model(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16


def test_weights_from_files(tmp_path):
    source = build(vit(), seed=3)
    state = {k: v.contiguous() for k, v in source.vit.state_dict().items()}
    save_file(state, tmp_path / "timm.safetensors")
    save_file({f"vit.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "headless.safetensors")
    more = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=7, **SMALL).state_dict()
    save_file(
        {**state, "head.weight": more["head.weight"], "head.bias": more["head.bias"]},
        tmp_path / "other_head.safetensors",
    )
    for name, has_head in {
        "timm.safetensors": True,
        ".": True,
        "headless.safetensors": False,
        "other_head.safetensors": False,
    }.items():
        loaded = build(vit(pretrained=True, path=str(tmp_path / name)))
        for key, value in loaded.vit.state_dict().items():
            assert torch.equal(value, state[key]) or (key.startswith("head.") and not has_head), (name, key)


def test_position_embeddings_are_resampled_for_another_image_size(tmp_path):
    save_file(build(vit(), seed=3).vit.state_dict(), tmp_path / "small.safetensors")
    model = build(vit(pretrained=True, path=str(tmp_path / "small.safetensors"), image_size=32))
    assert model.vit.pos_embed.shape == (1, 17, 32)
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)


def flax_weights(model: nn.Module, num_heads: int) -> dict[str, np.ndarray]:
    """The names and layouts of the original ViT-B_16.npz, written for a given network."""
    w = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    width = w["cls_token"].shape[-1]
    split = (num_heads, width // num_heads)
    out = {
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0), "embedding/bias": w["patch_embed.proj.bias"],
        "cls": w["cls_token"], "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"], "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T, "head/bias": w["head.bias"],
    }  # fmt: skip
    for i in range(len(model.blocks)):
        theirs, ours = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for norm, number in (("norm1", 0), ("norm2", 2)):
            out[f"{theirs}LayerNorm_{number}/scale"] = w[f"{ours}{norm}.weight"]
            out[f"{theirs}LayerNorm_{number}/bias"] = w[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            out[f"{attention}{name}/kernel"] = w[f"{ours}attn.qkv.weight"][rows].T.reshape(width, *split)
            out[f"{attention}{name}/bias"] = w[f"{ours}attn.qkv.bias"][rows].reshape(split)
        out[f"{attention}out/kernel"] = w[f"{ours}attn.proj.weight"].T.reshape(*split, width)
        out[f"{attention}out/bias"] = w[f"{ours}attn.proj.bias"]
        for number in (0, 1):
            out[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = w[f"{ours}mlp.fc{number + 1}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = w[f"{ours}mlp.fc{number + 1}.bias"]
    return out


def test_weights_from_the_original_npz_format(tmp_path):
    source = build(vit(), seed=3).vit
    np.savez(tmp_path / "ViT.npz", **flax_weights(source, num_heads=4))
    model = build(vit(pretrained=True, path=str(tmp_path / "ViT.npz")))
    for key, value in model.vit.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_files_of_another_architecture_are_refused(tmp_path):
    wide = build(vit(overrides={**SMALL, "embed_dim": 64})).vit
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    np.savez(tmp_path / "wide.npz", **flax_weights(wide, num_heads=4))
    np.savez(tmp_path / "nothing.npz", a=np.zeros(1))
    deep = build(vit(overrides={**SMALL, "depth": 3}))
    save_file({f"vit.{k}": v for k, v in deep.vit.state_dict().items()}, tmp_path / "deep.safetensors")
    for name in ("wide.safetensors", "wide.npz", "nothing.npz", "deep.safetensors"):
        with pytest.raises(ConfigError, match=rf"model\.path=.*{name} is a checkpoint of another architecture"):
            build(vit(pretrained=True, path=str(tmp_path / name)))


def test_more_layers_or_other_heads_in_an_npz_are_another_architecture(tmp_path):
    deep = build(vit(overrides={**SMALL, "depth": 3})).vit
    np.savez(tmp_path / "deep.npz", **flax_weights(deep, num_heads=4))
    np.savez(tmp_path / "heads.npz", **flax_weights(build(vit()).vit, num_heads=2))
    for name, reason in {"deep": "3 layers with 4 attention heads", "heads": "2 layers with 2 attention heads"}.items():
        sentence = rf"{name}\.npz is a checkpoint of another architecture \(it has {reason}, the network 2 with 4\)"
        with pytest.raises(ConfigError, match=sentence):
            build(vit(pretrained=True, path=str(tmp_path / f"{name}.npz")))


class Runs:
    """Unpickled, it writes a file: nobody's checkpoint may do that."""

    def __init__(self, file) -> None:
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    "kind", ["empty", "junk", "cut early", "cut late", "pickle", "pickle of torch", "folder of a hub pointer"]
)
def test_files_that_are_no_weights_are_refused(tmp_path, suffix, kind):
    file, ran = tmp_path / f"weights{suffix}", tmp_path / "ran"
    network = build(vit()).vit
    if suffix == ".npz":
        np.savez(file, **flax_weights(network, num_heads=4))
    else:
        save_file(network.state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes({
        "empty": b"", "junk": bytes(range(256)) * 40, "cut early": whole[:100], "cut late": whole[:-100],
        "pickle": pickle.dumps({"head.bias": Runs(ran)}), "pickle of torch": b"",
        "folder of a hub pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }[kind])  # fmt: skip
    if kind == "pickle of torch":
        torch.save({"head.bias": Runs(ran)}, file)
    sentence = rf"^model\.path={file} cannot be read as weights \([^\n]*\): give a whole \.safetensors or \.npz file$"
    with pytest.raises(ConfigError, match=sentence):
        build(vit(pretrained=True, path=str(file)))
    assert not ran.exists()


def test_an_npz_with_pickles_is_not_unpickled(tmp_path):
    arrays = flax_weights(build(vit()).vit, num_heads=4)
    for name in ("cls", "unused"):
        np.savez(tmp_path / "objects.npz", **arrays | {name: np.array([Runs(tmp_path / "ran")])})
        with pytest.raises(
            ConfigError, match=r"objects\.npz cannot be read as weights \(Object arrays cannot be loaded"
        ):
            build(vit(pretrained=True, path=str(tmp_path / "objects.npz")))
        assert not (tmp_path / "ran").exists()
    np.save(tmp_path / "single.npy", arrays["cls"])
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ConfigError, match=r"single\.npz cannot be read as weights \(it is a single array\)"):
        build(vit(pretrained=True, path=str(tmp_path / "single.npz")))


def test_damaged_numbers_are_refused(tmp_path):
    network = build(vit()).vit
    state = {k: v.clone() for k, v in network.state_dict().items()}
    save_file({**state, "norm.bias": state["norm.bias"].to(torch.int32)}, tmp_path / "int.safetensors")
    with pytest.raises(
        ConfigError, match=r"another architecture \(1 parameters are missing or do not fit, norm\.bias among"
    ):
        build(vit(pretrained=True, path=str(tmp_path / "int.safetensors")))
    with torch.no_grad():
        network.norm.bias[3] = float("nan")
    save_file(network.state_dict(), tmp_path / "nan.safetensors")
    np.savez(tmp_path / "nan.npz", **flax_weights(network, num_heads=4))
    for name in ("nan.safetensors", "nan.npz"):
        with pytest.raises(ConfigError, match=rf"model\.path=.*{name} holds NaN or inf \(in norm\.bias\)"):
            build(vit(pretrained=True, path=str(tmp_path / name)))


def test_half_a_head_is_replaced_whole(tmp_path):
    source, fresh = build(vit(), seed=3).vit.state_dict(), build(vit()).vit.state_dict()
    save_file({k: v for k, v in source.items() if k != "head.bias"}, tmp_path / "half.safetensors")
    loaded = build(vit(pretrained=True, path=str(tmp_path / "half.safetensors"))).vit.state_dict()
    assert all(torch.equal(value, (fresh if k.startswith("head.") else source)[k]) for k, value in loaded.items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 20}, "model.image_size=20 is no multiple of the patch size 8 of model=vit_tiny"),
        ({"image_size": 20, "overrides": {}}, "is no multiple of the patch size 16"),
        ({"path": "nowhere.npz", "pretrained": True}, "model.path=nowhere.npz is no file with weights"),
        ({"path": "~nobody/a.npz", "pretrained": True}, "model.path=~nobody/a.npz is no file with weights"),
        ({"pretrained": True}, "published weights do not fit a changed architecture"),
    ],
)
def test_problems(changes, sentence):
    (found,) = vit(**changes).problems(None)
    assert sentence in found


def test_a_path_that_cannot_be_one_is_refused():
    with pytest.raises(ValueError, match=r"model\.path=a+\.\.\. cannot be read \(.*too long"):
        vit(path="a" * 300 + ".npz", pretrained=True)


def test_a_name_that_timm_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"model\.timm_name=vit_huge_patch3 is not a network of timm"):
        vit(timm_name="vit_huge_patch3").preprocessor(None)


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(8, 8), (37, 61)])
def test_preprocessing_equals_torchvision(tmp_path, size, mode):
    file = tmp_path / "image.png"
    photo(size, mode).save(file)
    transform = ImageTransform(16, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    bytes_ = transform.read(file)
    assert (bytes_.dtype, bytes_.shape) == (torch.uint8, (3, 16, 16))
    theirs = transforms.Compose(
        [
            transforms.Resize((16, 16), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )
    expected = theirs(Image.open(file).convert("RGB"))
    assert torch.equal(transform.normalize(bytes_[None])[0], expected)


def test_normalization_is_that_of_the_weights():
    for name in ("vit_base_patch16_224.orig_in21k", "vit_base_patch16_224.augreg_in21k"):
        changes = {"timm_name": name, "overrides": {}, "image_size": 224}
        found = vit(**changes).preprocessor(None)
        assert (found.size, found.interpolation) == (224, "bicubic")
        assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        assert vit(**changes, normalization="imagenet").preprocessor(None).mean == timm.data.IMAGENET_DEFAULT_MEAN
        assert vit(**changes, normalization="imagenet").preprocessor(None).std == timm.data.IMAGENET_DEFAULT_STD
        assert vit(**changes, normalization="none").preprocessor(None).std == (1.0, 1.0, 1.0)
