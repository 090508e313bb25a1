"""inspect_dataset reports an error, without a traceback, for any flipped bit of a dataset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import inspect_dataset, preprocess_data


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flipped")
    texts = ["吾輩は猫である", ["a", "bc"], "the end"]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "in.jsonl").write_text("\n".join(lines))
    arguments = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "d")]
    arguments += ["--tokenizer-type", "ByteLevelTokenizer", "--append-eod", "--workers", "1"]
    assert preprocess_data.main(arguments) == 0
    return folder / "d_text_document"


# Every bit of the index; of the other files a selection, at every position in a byte.
@pytest.mark.parametrize(
    ("suffix", "step", "sentencepiece"),
    [(".idx", 1, False), (".bin", 7, False), (".bin", 7, True), (".json", 23, False)],
)
def test_no_traceback(suffix, step, sentencepiece, dataset, model, capsys):
    path = Path(f"{dataset}{suffix}")
    whole = path.read_bytes()
    kind = ["--tokenizer-type", "ByteLevelTokenizer"]
    if sentencepiece:
        kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    show = [str(dataset), "--documents", "0", "-1", *kind]
    commands = [show] if sentencepiece else [show, [str(dataset)], ["--verify", str(dataset)]]
    for bit in range(0, 8 * len(whole), step):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        codes = [inspect_dataset.main(command) for command in commands]
        assert set(codes) <= {0, 1, 2}
        if suffix != ".json" and not sentencepiece:
            assert codes[-1] == 1, f"bit {bit} is not found"
    path.write_bytes(whole)
    assert inspect_dataset.main(["--verify", str(dataset)]) == 0
    assert "Traceback" not in capsys.readouterr().err
