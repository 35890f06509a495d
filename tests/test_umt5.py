"""UMT5 as Wan uses it, on a tiny random encoder; and its embeddings on disk: the same, verified, shared, usable without the encoder."""

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan import pipeline_wan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wam.text.cache import CachedText
from wam.text.umt5 import UMT5Text, clean_prompt

TEXTS = ["open the drawer", "  push\n the &amp;lt;red&amp;gt; button ", ""]
WORDS = ["<pad>", "</s>", "<unk>", "open", "close", "the", "drawer"]


def _encoder(seed: int = 0, **changes: object) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = dict(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, tie_word_embeddings=False)
    return UMT5EncoderModel(UMT5Config(**{**config, **changes})).eval()


def _text(seed: int = 0, max_tokens: int = 40) -> UMT5Text:
    return UMT5Text(_encoder(seed), ByT5Tokenizer(), max_tokens)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer, as UMT5's is."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


# ------------------------------------------------------------------------------------------------ the encoder


@pytest.mark.parametrize("tokenizer", [ByT5Tokenizer(), _word_tokenizer()], ids=["bytes", "words"])
def test_embeddings_are_those_of_wans_pipeline(tokenizer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)  # leaves plain ASCII alone
    encoder = _encoder()
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, _execution_device="cpu")
    expected = WanPipeline._get_t5_prompt_embeds(pipeline, TEXTS, max_sequence_length=40)
    found = UMT5Text(encoder, tokenizer, 40)(TEXTS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    lengths = [len(tokenizer(clean_prompt(text)).input_ids) for text in TEXTS]  # type: ignore[operator]
    assert lengths[2] == 1 and all(bool((row[n:] == 0).all()) and bool((row[n - 1] != 0).any()) for row, n in zip(found, lengths, strict=True))


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    text = _text()
    torch.testing.assert_close(text(TEXTS)[:1], text(TEXTS[:1]), atol=1e-5, rtol=0)
    assert text([]).shape == (0, 40, 32)


def test_prompts_are_cleaned_as_wan_does() -> None:
    assert clean_prompt(TEXTS[1]) == "push the <red> button"
    assert clean_prompt("a\u00a0 b\t") == "a b"


def test_repairing_unicode_says_what_it_needs() -> None:
    try:
        import ftfy  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match="pip install ftfy"):
            clean_prompt("caf\u00c3\u00a9", repair_unicode=True)
    else:
        assert clean_prompt("caf\u00c3\u00a9", repair_unicode=True) == "caf\u00e9"


def test_an_instruction_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16 tokens, more than text.max_tokens 15"):
        _text(max_tokens=15)(["open the drawer"])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        UMT5Text(_encoder(vocab_size=100), ByT5Tokenizer())


def test_loading_ties_the_embedding_that_checkpoints_hold_once(tmp_path: Path) -> None:
    text = UMT5Text(_encoder(), _word_tokenizer(), 12)
    text.encoder.save_pretrained(tmp_path / "text_encoder")
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {k: v for k, v in text.encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    loaded = UMT5Text.from_pretrained(tmp_path, dtype=torch.float32, max_tokens=12)
    assert torch.equal(loaded(["open the drawer"]), text(["open the drawer"]))
    assert loaded.identity() == text.identity()

    safetensors.torch.save_file({k: v for k, v in tensors.items() if not k.endswith("wo.weight")}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 weights"):
        UMT5Text.from_pretrained(tmp_path, max_tokens=12)
    with pytest.raises(FileNotFoundError, match="diffusers' layout"):
        UMT5Text.from_pretrained(tmp_path / "nowhere")


def test_the_identity_is_that_of_what_decides_an_embedding() -> None:
    text = _text()
    text(["a call changes nothing"])
    assert text.identity() == _text().identity() == _text(max_tokens=20).identity()
    words = UMT5Text(_encoder(), _word_tokenizer())
    words.tokenizer(["open"], padding="max_length", max_length=9, truncation=True)
    assert words.identity() == UMT5Text(_encoder(), _word_tokenizer()).identity()
    others = [_text(seed=1), UMT5Text(_encoder(num_heads=2, d_kv=16), ByT5Tokenizer()), UMT5Text(_encoder().bfloat16(), ByT5Tokenizer())]
    others += [words, UMT5Text(_encoder(), ByT5Tokenizer(), repair_unicode=True)]
    assert len({t.identity() for t in [text, *others]}) == 6


# ------------------------------------------------------------------------------------------------ the cache


class Stub:
    """Counts what it is asked, and answers with a text's letters."""

    max_tokens, width = 6, 3

    def __init__(self) -> None:
        self.asked: list[str] = []

    def identity(self) -> str:
        return "stub"

    def __call__(self, instructions: list[str]) -> Tensor:
        self.asked += instructions
        out = torch.zeros(len(instructions), 6, 3)
        for row, text in zip(out, instructions, strict=True):
            row[: len(text)] = torch.tensor([[float(ord(c))] * 3 for c in text]).view(-1, 3)
        return out


def test_cached_embeddings_are_the_encoders_own(tmp_path: Path) -> None:
    text = _text()
    cached = CachedText(text, tmp_path)
    texts = [TEXTS[0], TEXTS[1], TEXTS[0]]
    first, expected = cached(texts), text(texts)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    assert torch.equal(cached(texts), first) and (cached.counts.encoded, cached.counts.read) == (2, 2)
    assert torch.equal(CachedText(None, tmp_path)(texts), first)
    assert list(cached.path(TEXTS[0]).parent.glob(".*")) == []
    assert safetensors.torch.load_file(cached.path("open the drawer"))["embedding"].shape == (16, 32)  # 15 bytes and the end; no padding


def test_other_encoders_and_lengths_do_not_share_entries(tmp_path: Path) -> None:
    texts = [_text(), _text(seed=1), _text(max_tokens=20)]
    spaces = {CachedText(t, tmp_path).space for t in texts}
    assert len(spaces) == 3
    with pytest.raises(ValueError, match="3 encoders"):
        CachedText(None, tmp_path)
    space = CachedText(texts[2], tmp_path).space
    assert CachedText(None, tmp_path, space).max_tokens == 20
    with pytest.raises(ValueError, match="other weights, tokenizer, cleaning or max_tokens"):
        CachedText(texts[0], tmp_path, space)
    with pytest.raises(FileNotFoundError, match="'nothing'"):
        CachedText(None, tmp_path, "nothing")


def test_without_an_encoder_the_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text embeddings in"):
        CachedText(None, tmp_path)
    CachedText(Stub(), tmp_path)(["abc"])
    alone = CachedText(None, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"instruction 'xy' and 1 more .*precompute"):
        alone(["abc", "xy", "z"])
    assert not alone.state_dict() and alone(["abc"]).shape == (1, 6, 3)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other text"])
def test_damaged_entries_are_encoded_again_and_counted(tmp_path: Path, damage: str) -> None:
    encoder = Stub()
    cached = CachedText(encoder, tmp_path)
    expected = cached(["abc", "de"])
    path = cached.path("abc")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes(cached.path("de").read_bytes() if damage == "other text" else content[: -9 if damage == "truncated" else None])
    alone = CachedText(None, tmp_path)
    with pytest.raises(FileNotFoundError, match="no sound embedding of the instruction 'abc'"):
        alone(["abc"])
    assert alone.counts.damaged == 1
    assert torch.equal(cached(["abc", "de"]), expected)
    assert encoder.asked == ["abc", "de", "abc"] and (cached.counts.damaged, cached.counts.encoded) == (1, 3)
    assert torch.equal(CachedText(None, tmp_path)(["abc", "de"]), expected)


def test_precomputing_encodes_each_text_once(tmp_path: Path) -> None:
    encoder = Stub()
    cached = CachedText(encoder, tmp_path)
    assert cached.precompute(["abc", "de", "abc", "f"], batch_size=2) == 3
    assert cached.precompute(["abc", "de"]) == 0 and encoder.asked == ["abc", "de", "f"]


def _fill(directory: Path, texts: list[str]) -> None:
    CachedText(Stub(), directory).precompute(texts, batch_size=3)


def test_several_processes_share_a_directory(tmp_path: Path) -> None:
    texts = [c * n for c in "abcdefgh" for n in (1, 2)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, texts[i:] + texts[:i])) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    alone = CachedText(None, tmp_path)
    assert torch.equal(alone(texts), Stub()(texts)) and alone.counts.damaged == 0
    assert len(list(alone.folder.iterdir())) == len(texts) + 1


def test_the_encoder_is_no_part_of_the_model(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = CachedText(_text(), tmp_path)

    model = Model()
    assert not model.state_dict() and not list(model.parameters()) and model.text.encoder is not None
    described = json.loads((model.text.folder / "encoder.json").read_text())
    assert (described["max_tokens"], described["width"]) == (40, 32)
