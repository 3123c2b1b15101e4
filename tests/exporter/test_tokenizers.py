# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's own tokenizer decides: directories that transformers writes, held against transformers' pipelines."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from perceiver_export.calibration import QuantizeOptions, certify, quantize
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.exporter import export, load_model, package
from perceiver_export.exporter.checkpoints.tokenizer import find_tokenizer
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.bundle import read_manifest
from perceiver_export.runtimes.errors import CheckpointError, DataError, InputError, LongTextError
from perceiver_export.runtimes.preprocessing import TextPreprocessing
from perceiver_export.runtimes.tasks.tokenizers import ByteTokenizer, FileTokenizer, open_tokenizer
from tests.calibration.asked import judged
from tests.conftest import MadeOnce

from .conftest import MakeCheckpoint

transformers: Any = importlib.import_module("transformers")

CORPUS = ["The cat sat on the mat, didn't it?", "A dog ran in the Park .", "Größe, naïve café — 東京!"] * 20
TEXTS = [
    *CORPUS[:3],
    "a",
    "  two  spaces\tand a tab\n",
    "cat[SEP]dog",
    "[MASK] <mask>",
    "\U0001f600 emoji",
    "the cat sat on the mat and the dog ran " * 3,
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTH = 24


@functools.cache
def wordpieces() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    ends = [(text, backend.token_to_id(text)) for text in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return backend


def wordpiece(**options: Any) -> Any:
    named = {f"{text[1:-1].lower()}_token": text for text in SPECIAL}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=wordpieces(), **{**named, **options})


def byte_level(**options: Any) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=letters)
    )
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.RobertaTokenizerFast(vocab=model["vocab"], merges=merges, **options)


def unigram(**options: Any) -> Any:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="[UNK]")
    )
    # The mask is a token of the vocabulary that only the config calls special.
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]", **options
    )


def bert(**options: Any) -> Any:
    return transformers.BertTokenizerFast(vocab=wordpieces().get_vocab(), clean_up_tokenization_spaces=True, **options)


MAKERS: dict[str, Callable[..., Any]] = {
    "wordpiece": wordpiece,
    "byte-level": byte_level,
    "unigram": unigram,
    "bert": bert,
}


def checkpoint(make_checkpoint: MakeCheckpoint, kind: str, tokenizer: Any, **changes: Any) -> Path:
    size = max(tokenizer.get_vocab().values()) + 1
    directory = make_checkpoint(
        kind, vocab_size=size, max_position_embeddings=LENGTH, num_blocks=1, num_self_attends_per_block=1, **changes
    )
    tokenizer.save_pretrained(directory)
    return directory


ExportedOnce = Callable[..., tuple[Path, Path]]


@pytest.fixture
def exported_once(make_checkpoint: MakeCheckpoint, made_once: MadeOnce) -> ExportedOnce:
    """``exported_once(kind, name, **config)``: a checkpoint with a tokenizer that pads on the left, and its bundle."""

    def exported(kind: str, name: str, **changes: Any) -> tuple[Path, Path]:
        def make(folder: Path) -> None:
            made = checkpoint(make_checkpoint, kind, MAKERS[name](padding_side="left"), **changes)
            shutil.copytree(made, folder / "checkpoint")
            export(folder / "checkpoint", folder / "bundle")

        folder = made_once(f"{kind} with {name}", make)
        return folder / "checkpoint", folder / "bundle"

    return exported


def ours(directory: Path, **changes: Any) -> FileTokenizer:
    found = find_tokenizer(directory, "text-classification", LENGTH, 1000)
    assert found.steps is not None
    assert found.steps.tokenizer is not None
    assert found.files.keys() == {"tokenizer.json"}
    (directory / "bundled.json").write_bytes(found.files["tokenizer.json"])
    steps = msgspec.structs.replace(found.steps, **changes)
    return FileTokenizer(directory / "bundled.json", steps, found.steps.tokenizer)


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "left")], ids=lambda sides: sides[0])
@pytest.mark.parametrize("name", MAKERS)
def test_tokens_and_text_are_those_of_transformers(name: str, sides: tuple[str, str], tmp_path: Path) -> None:
    MAKERS[name](padding_side=sides[0], truncation_side=sides[1], model_max_length=9).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    whole, cut = ours(tmp_path), ours(tmp_path, truncate=True)
    assert (whole.mask, whole.mask_text) == (theirs.mask_token_id, theirs.mask_token)
    assert whole.pad_token == theirs.pad_token_id
    for text in TEXTS:
        expected = theirs(text, truncation=True)["input_ids"]
        found = cut.encode(text)
        assert found.tolist() == expected
        padded = cut.pad([found])
        assert padded["tokens"][0].tolist() == expected + [theirs.pad_token_id] * (LENGTH - len(expected))
        assert padded["tokens_mask"][0].tolist() == [1] * len(expected) + [0] * (LENGTH - len(expected))
        assert cut.text(found) == theirs.decode(expected, skip_special_tokens=True)
        assert [cut.symbol(token) for token in expected] == [theirs.decode([token]) for token in expected]
        special = {token for token, one in theirs.added_tokens_decoder.items() if one.special}
        assert cut.ordinary(found).tolist() == [token not in special for token in expected]
        uncut = theirs(text)["input_ids"]
        if len(uncut) > LENGTH:
            with pytest.raises(InputError, match=f"{len(uncut)}.*{LENGTH}"):
                whole.encode(text)
        else:
            assert whole.encode(text).tolist() == uncut


def test_perceivers_own_tokenizer_is_cut_as_in_transformers(tmp_path: Path) -> None:
    for side in ("left", "right"):
        theirs = transformers.PerceiverTokenizer(model_max_length=9, truncation_side=side)
        theirs.save_pretrained(tmp_path)
        found = find_tokenizer(tmp_path, "fill-mask", LENGTH, 262)
        assert found.steps == TextPreprocessing(LENGTH, True, None, False, 9, side)
        assert not found.notes
        tokenizer = ByteTokenizer(LENGTH, True, 9, found.steps.truncation_side)
        for text in ("short", "naïve [MASK][MASK] text", "[MASK]" * 30, "Größenwahn"):
            assert tokenizer.encode(text).tolist() == theirs(text, truncation=True)["input_ids"]


@pytest.mark.parametrize("name", ["byte-level", "unigram", "bert"])
def test_masks_are_filled_as_by_the_pipeline(name: str, exported_once: ExportedOnce) -> None:
    directory, bundle = exported_once("language", name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    theirs = transformers.pipeline("fill-mask", model=str(directory), tokenizer=tokenizer, device="cpu")
    with open_task(bundle) as fill:
        for text in (f"The cat {tokenizer.mask_token} on the mat .", f"{tokenizer.mask_token}"):
            expected, filled = theirs(text, top_k=4), fill(text, top=4)
            (blank,) = filled.blanks
            assert [one.token for one in blank.candidates] == [one["token"] for one in expected]
            assert [one.symbol for one in blank.candidates] == [one["token_str"] for one in expected]
            scores = pytest.approx([one["score"] for one in expected], abs=1e-5)
            assert [one.probability for one in blank.candidates] == scores
            assert filled.text == expected[0]["sequence"]
        two = f"A {tokenizer.mask_token} ran {tokenizer.mask_token}"
        tops = [[one["token"] for one in row] for row in theirs(two, top_k=2)]
        assert [[one.token for one in blank.candidates] for blank in fill(two, top=2).blanks] == tops
        with pytest.raises(InputError, match=tokenizer.mask_token.strip("[]")):
            fill("nothing is masked")


def test_texts_are_classified_as_by_the_pipeline(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tokenizer = wordpiece(model_max_length=LENGTH)
    tokenizer("x", truncation=True)  # as training does it; it stays in tokenizer.json
    directory = checkpoint(make_checkpoint, "text", tokenizer)
    bundle = export(directory, tmp_path / "bundle")
    assert bundle.manifest.files.keys() >= {"tokenizer.json"}
    for server in ("triton", "ovms"):  # whose clients make the tokens
        (model,) = package(bundle, server, tmp_path / server).glob("*/")
        served = open_tokenizer(read_manifest(model), model)
        assert served.encode(TEXTS[0]).tolist() == ours(directory).encode(TEXTS[0]).tolist()
    theirs = transformers.pipeline("text-classification", model=str(directory), device="cpu")
    with open_task(tmp_path / "bundle") as classify:
        answers = classify.batch(TEXTS, top=5)
        for text, found in zip(TEXTS, answers, strict=True):
            expected = theirs(text, top_k=5, truncation=True)
            assert [one.label for one in found] == [one["label"] for one in expected]
            assert [one.probability for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)


@pytest.mark.usefixtures("untimed")
def test_a_text_that_is_too_long_is_counted_or_cut_and_the_tokenizer_stays_with_the_bundle(
    exported_once: ExportedOnce, tmp_path: Path
) -> None:
    directory, bundle = exported_once("text", "bert", num_labels=2)
    data = tmp_path / "texts.jsonl"
    texts = [*CORPUS[:9], "the cat sat on the mat " * 9]
    data.write_text("".join(json.dumps({"text": f"{text} {row}", "label": 0}) + "\n" for row, text in enumerate(texts)))

    made = quantize(bundle, data, tmp_path / "int8")
    assert "tokenizer.json" in made.manifest.files
    assert (made.path / "tokenizer.json").read_bytes() == (bundle / "tokenizer.json").read_bytes()
    assert any("1 of 10" in note and "texts.jsonl:10" in note for note in made.manifest.notes)

    left_out = judged(made, data, against=bundle)
    assert left_out.samples == 9
    assert any("1 of 10" in warning and "texts.jsonl:10" in warning for warning in left_out.warnings)
    cut = judged(made, data, against=bundle, truncate=True)
    assert cut.samples == 10
    assert "1 of 10 texts" in dict(zip(cut.warning_kinds, cut.warnings, strict=True))["cut"]

    by_cut = quantize(bundle, data, tmp_path / "cut", QuantizeOptions(truncate=True))
    assert any("1 of 10 texts" in note and "cut" in note for note in by_cut.manifest.notes)
    assert by_cut.manifest.preprocessing == made.manifest.preprocessing
    record, without = read_calibration(by_cut), read_calibration(made)
    assert record is not None
    assert without is not None
    assert (record.data.samples, without.data.samples) == (10, 9)

    with open_task(bundle) as classify, pytest.raises(LongTextError):
        classify(texts[-1])
    with open_task(bundle, truncate=True) as classify:
        theirs = transformers.pipeline("text-classification", model=str(directory), device="cpu")
        (expected,) = theirs(texts[-1], truncation=True, max_length=LENGTH, top_k=1)
        (found,) = classify(texts[-1], top=1)
        assert (found.label, found.probability) == (expected["label"], pytest.approx(expected["score"], abs=1e-5))

    data.write_text(json.dumps({"text": texts[-1]}))
    with pytest.raises(DataError, match=r"texts\.jsonl:1"):
        judged(bundle, data, against=bundle, against_device="ort-cpu")


@pytest.mark.usefixtures("untimed")
def test_a_certificate_says_how_many_texts_were_cut(exported_once: ExportedOnce, tmp_path: Path) -> None:
    (_, bundle), data = exported_once("text", "bert", num_labels=2), tmp_path / "texts.jsonl"
    texts = [f"{text} {row}" for row, text in enumerate(CORPUS)] + ["the cat sat on the mat " * 9]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    int8 = quantize(bundle, data, tmp_path / "int8", QuantizeOptions(truncate=True))

    found = judged(int8, data, against=bundle, metric="kl", max_metric_change=5e-4, truncate=True)
    (certificate,) = certify(int8, [found])

    assert any("1 of 61 texts" in reservation for reservation in found.gates[0].reservations)
    assert any("1 of 61 texts" in caveat for caveat in certificate.caveats)


def test_tokens_beyond_the_bytes_are_judged(exported_once: ExportedOnce, tmp_path: Path) -> None:
    """The vocabulary is the tokenizer's, of 300, and not that of bytes, of 262."""
    (directory, bundle), data = exported_once("language", "byte-level"), tmp_path / "texts.jsonl"
    assert max(transformers.AutoTokenizer.from_pretrained(directory)(CORPUS[0])["input_ids"]) >= 262
    data.write_text("".join(json.dumps({"text": f"{row} {text}"}) + "\n" for row, text in enumerate(CORPUS[:6])))

    found = judged(bundle, data, against=bundle, against_device="ort-cpu")

    assert found.samples == 6
    agreement = found.metric("agreement")
    assert agreement is not None
    assert agreement.candidate.value == 100


def test_another_vocabulary_without_a_tokenizer_says_which_files_to_give(make_checkpoint: MakeCheckpoint) -> None:
    (note,) = (one for one in load_model(make_checkpoint("text", vocab_size=300)).notes if "token ids" in one)
    assert "vocab_size is 300" in note
    assert "tokenizer.json" in note


def only_a_vocabulary(directory: Path) -> None:
    (directory / "vocab.txt").write_text("\n".join(SPECIAL))


def another_class(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')


def renamed_tokens(directory: Path) -> None:
    transformers.PerceiverTokenizer(mask_token="<mask>").save_pretrained(directory)


def another_vocabulary(directory: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("files", "size"),
    [(only_a_vocabulary, 262), (another_class, 262), (renamed_tokens, 262), (another_vocabulary, 300)],
)
def test_of_other_tokenizers_the_bundle_takes_token_ids_and_says_so(
    files: Callable[[Path], None], size: int, make_checkpoint: MakeCheckpoint
) -> None:
    directory = make_checkpoint("text", vocab_size=size, max_position_embeddings=LENGTH)
    files(directory)
    loaded = load_model(directory)
    assert (loaded.task, loaded.preprocessing) == ("arrays", None)
    assert any("token ids" in note for note in loaded.notes)


def test_bytes_are_assumed_only_of_their_vocabulary_and_the_note_says_so(make_checkpoint: MakeCheckpoint) -> None:
    loaded = load_model(make_checkpoint("text"))
    assert loaded.preprocessing == TextPreprocessing(13, True)
    assert any("bytes" in note for note in loaded.notes)


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        pipe,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text(wordpieces().to_str()[:-40]),
        lambda path: os.truncate(path, 1 << 30) if path.touch() is None else None,
        lambda path: path.write_text(Tokenizer(models.WordLevel({"a": 7}, "a")).to_str().replace("7", str(1 << 31))),
    ],
    ids=["pipe", "directory", "not UTF-8", "empty", "nested", "cut", "1 GiB", "token number 2147483648"],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    damage(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError) as found:
        find_tokenizer(tmp_path, "fill-mask", LENGTH, 100)
    assert "\n" not in found.value.message
    assert len(found.value.message) < 400


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """transformers warns of what is of no interest here: of texts that are too long, and of unused weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
