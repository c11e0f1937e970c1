import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.commands.prepare import run
from gpt.configs.data_config import DataConfig
from gpt.data.corpus import open_corpus
from gpt.data.manifest import read_corpus_manifest
from gpt.data.prepare import parts
from gpt.errors import UserError
from gpt.main import main
from tests.conftest import make_text, read_files


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_text("".join(json.dumps({"body": make_text(50, seed=index)}) + "\n" for index in range(40)))
    return path


@pytest.fixture(scope="module")
def prepared(lines: Path) -> Path:
    out = lines.parent / "prepared"
    assert run([str(lines), "--out", str(out), "--text-field", "body", "--tokenizer", "byte"]) == 0
    return out


def prepare_error(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Return the error line of a command that ends with status 2."""
    capsys.readouterr()
    assert main(["prepare", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpt: error: ")
    assert error.count("\n") == 1
    assert "--data." not in error
    return error


def test_prepared_folder_is_described(lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--text-field", "body", "--tokenizer", "byte", "--workers", "1"]
    assert main(["prepare", str(lines), str(lines), "--out", str(tmp_path / "new" / "out"), *flags]) == 0
    out = capsys.readouterr().out
    manifest = read_corpus_manifest(tmp_path / "new" / "out")
    for fact in (
        manifest.sha256,
        "257 tokens, end_of_text 256",
        "80 documents",
        "lines train",
        "lines-2 val",
        "uint16",
    ):
        assert fact in out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_json_equals_the_plain_output(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--inspect", str(prepared)]) == 0
    plain = capsys.readouterr().out
    assert main(["prepare", "--inspect", str(prepared), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = read_corpus_manifest(prepared)
    for name in "sha256 tokenizer_sha256 vocab_size dtype largest_id tokens documents text_bytes".split():
        assert facts[name] == getattr(manifest, name)
        shown = f"{facts[name]:,}" if isinstance(facts[name], int) else facts[name]
        assert shown in plain
    (source,) = facts["sources"]
    for split in ("train", "val"):
        assert f"{source[split]['documents']} documents, {source[split]['shards']} shard" in plain
    assert facts["folder"] == str(prepared)
    assert plain.endswith(facts["excerpt"] + "\n")


def test_preparing_with_json_prints_the_same_facts_as_inspecting(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run([str(lines), "--out", out, "--text-field", "body", "--tokenizer", "byte", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert run(["--inspect", out, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected.pop("excerpt")
    assert facts == inspected


def test_inspect_shows_the_facts_and_a_text(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--inspect", str(prepared)]) == 0
    out = capsys.readouterr().out
    assert read_corpus_manifest(prepared).sha256 in out
    assert "<|endoftext|>" in out
    assert any(make_text(50, seed=index)[:60].split("\n")[0] in out for index in range(40))


def test_inspect_finds_a_flipped_bit_in_any_file(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared, tmp_path / "out")
    rng = random.Random(0)
    for path in sorted((tmp_path / "out").iterdir()):
        original = path.read_bytes()
        for place in (0, len(original) - 2, *(rng.randrange(len(original)) for _ in range(10))):
            changed = bytearray(original)
            changed[place] ^= 1 << rng.randrange(7)
            path.write_bytes(changed)
            assert str(path) in prepare_error(capsys, "--inspect", tmp_path / "out")
        path.write_bytes(original)
    assert main(["prepare", "--inspect", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "train-000000.safetensors").unlink()
    error = prepare_error(capsys, "--inspect", tmp_path / "out")
    assert "train-000000.safetensors: cannot be read: No such file" in error


def test_inspect_rejects_a_folder_that_is_not_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}: no prepared corpus here" in prepare_error(capsys, "--inspect", tmp_path)


def test_inspect_says_what_a_folder_is_instead(
    lines: Path, tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text")
    expected = (
        f"gpt: error: --inspect {texts}: no prepared corpus here; gpt prepare {texts} --out DIR prepares the texts"
    )
    assert prepare_error(capsys, "--inspect", texts).startswith(expected)
    error = prepare_error(capsys, "--inspect", finished_run)
    assert f"{finished_run}: the folder of a run, not a prepared one; gpt verify {finished_run}" in error
    assert f"{tmp_path / 'none'}: no such folder" in prepare_error(capsys, "--inspect", tmp_path / "none")
    (tmp_path / ".part.unfinished").mkdir()
    assert "not complete yet; run the same gpt prepare" in prepare_error(capsys, "--inspect", tmp_path / "part")
    for flags in ((texts,), ("--out", tmp_path / "out")):
        assert "leave out SOURCE and --out" in prepare_error(capsys, *flags, "--inspect", texts)


def test_prepared_folder_may_not_lie_in_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text " * 100)
    error = prepare_error(capsys, texts, "--out", texts / "out")
    assert error == f"gpt: error: --out {texts / 'out'} lies in the source {texts}; name a folder beside it\n"
    assert not (texts / "out").exists()


def test_mistake_is_one_line_with_the_flags_of_this_command(
    lines: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out", "--tokenizer", "byte")
    assert "usage: gpt prepare SOURCE... --out DIR" in prepare_error(capsys)
    assert "usage: gpt prepare SOURCE... --out DIR" in prepare_error(capsys, lines)
    assert "usage: gpt prepare SOURCE... --out DIR" in prepare_error(capsys, *out)
    error = prepare_error(capsys, lines, *out)
    assert error.startswith(f"gpt: error: {lines}: line 1: no text under 'text'; set --text-field to one of: body")
    assert "(--on-error skip leaves such records out)" in error
    assert prepare_error(capsys, "none.txt", *out).startswith("gpt: error: none.txt: no such file or folder")
    error = prepare_error(capsys, lines, *out, "--text-field", "body", "--val-source", "none.txt")
    assert error.startswith("gpt: error: --val-source none.txt: no such file or folder")
    assert "--tokenizer none.json: no such file" in prepare_error(
        capsys, lines, "--text-field", "body", "--out", tmp_path / "out", "--tokenizer", "none.json"
    )
    assert f"--out {prepared} exists already; gpt prepare --inspect" in prepare_error(capsys, lines, "--out", prepared)
    assert f"--out {lines}: cannot write there" in prepare_error(capsys, lines, "--out", lines / "out")
    assert "unknown flag --text-feild; did you mean --text-field?" in prepare_error(capsys, lines, "--text-feild", "x")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_warnings_name_the_flags_of_this_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text " * 100)
    (texts / "rows.csv").write_text("id,body\n1,a\n")
    assert run([str(texts), "--out", str(tmp_path / "out"), "--tokenizer", "byte"]) == 0
    (line,) = [message for message in caplog.messages if "left out" in message]
    assert line.endswith("rows.csv (no column 'text'; set --text-field to one of: id, body)")


def test_bad_text_is_named_with_file_and_offset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--out", tmp_path / "out", "--tokenizer", "byte")
    path = tmp_path / "t.txt"
    path.write_bytes(b"good \xff")
    assert f"{path}: not UTF-8 at byte offset 5 (0xff)" in prepare_error(capsys, path, *flags)
    path.write_bytes(b"")
    assert f"{path}: the file is empty; name one with text in it" in prepare_error(capsys, path, *flags)
    path.write_text('{"text": "\\ud800"}\n{"text": "b"}\n')
    assert f"{path}: line 1: not valid Unicode: a lone surrogate" in prepare_error(capsys, path, *flags)


def test_missing_library_names_its_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    error = prepare_error(capsys, tmp_path / "t.parquet", "--out", tmp_path / "out", "--tokenizer", "byte")
    assert "t.parquet: needs pyarrow.parquet; pip install 'gpt-training-pipeline[parquet]'" in error


def test_bad_records_of_every_part_are_counted(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    (tmp_path / "t.jsonl").write_bytes(b"nonsense\n" + lines.read_bytes() + b'{"body": 7}\n')
    flags = ["--out", str(tmp_path / "out"), "--tokenizer", "byte", "--text-field", "body"]
    error = prepare_error(capsys, tmp_path / "t.jsonl", *flags, "--workers", "1")
    assert f"{tmp_path / 't.jsonl'}: line 1: not valid JSON" in error
    assert run([str(tmp_path / "t.jsonl"), *flags, "--on-error", "skip", "--workers", "2"]) == 0
    assert "2 bad records, 0 duplicates" in capsys.readouterr().out
    assert read_corpus_manifest(tmp_path / "out").sources[0].skipped_records == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; getrusage includes the parent's memory")
def test_one_very_long_line_is_prepared_in_bounded_memory(tmp_path: Path) -> None:
    size = 8_000_000
    (tmp_path / "line.txt").write_text(make_text(1000).replace("\n", " ") * (size // 5000))
    code = (
        "import re, sys; from gpt.main import main; status = main(); text = open('/proc/self/status').read();"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', text)[1], file=sys.stderr); sys.exit(status)"
    )
    flags = ["--out", str(tmp_path / "out"), "--tokenizer", "byte", "--workers", "1"]
    command = [sys.executable, "-c", code, "prepare", str(tmp_path / "line.txt"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stderr.split()[-1]) * 1024 < 200 * 2**20
    assert read_corpus_manifest(tmp_path / "out").text_bytes == (tmp_path / "line.txt").stat().st_size
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_repeated_characters_are_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a" * 100_000, " " * 100_000, "\n" * 100_000, "b c"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert run([str(tmp_path / "t.jsonl"), *flags]) == 0
    assert read_corpus_manifest(tmp_path / "out").text_bytes == sum(map(len, texts))


FULL = """
mount -t tmpfs -o size=1m none "$1" || exit 99
"$2" -m gpt.main prepare "$3" --out "$1/out" --text-field body --tokenizer byte --workers 1 2> "$4/error"
echo $? > "$4/status"
ls -A "$1" > "$4/left"
mount -o remount,size=50m "$1"
"$2" -m gpt.main prepare "$3" --out "$1/out" --text-field body --tokenizer byte --workers 1 && cp -r "$1/out" "$4/out"
"""


def test_on_a_full_disk_the_same_command_finishes_when_there_is_room(lines: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    source, disk = tmp_path / "lines.jsonl", tmp_path / "disk"
    source.write_bytes(lines.read_bytes() * 100)
    disk.mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", str(disk), sys.executable, str(source), str(tmp_path)]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if done.returncode == 99:
        pytest.skip("no file system may be mounted here")
    assert done.returncode == 0
    error = (tmp_path / "error").read_text()
    assert error.startswith(
        f"gpt: error: --out {disk / 'out'}: cannot be written: No space left on device; run the same command again"
    )
    assert error.count("\n") == 1
    assert (tmp_path / "status").read_text() == "2\n"
    assert "out" not in (tmp_path / "left").read_text().split()
    flags = ["--text-field", "body", "--tokenizer", "byte", "--workers", "1"]
    assert run([str(source), "--out", str(tmp_path / "at-once"), *flags]) == 0
    assert read_files(tmp_path / "out") == read_files(tmp_path / "at-once")


def test_flag_outside_section_data_keeps_its_name() -> None:
    with pytest.raises(UserError, match=r"^--val-fraction 0.9: must be at most 0.5"):
        run(["x", "--out", "y", "--val-fraction", "0.9"])


def test_vocabulary_that_the_text_cannot_fill_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten " * 20)
    sizes = []
    for asked in (8192, 260):
        out = tmp_path / str(asked)
        assert main(["prepare", str(tmp_path / "a.txt"), "--vocab-size", str(asked), "--out", str(out)]) == 0
        sizes.append(read_corpus_manifest(out).vocab_size)
        note = f"vocabulary {sizes[-1]} of {asked:,} asked: the text has no more merges"
        is_short = sizes[-1] < asked
        assert (note in capsys.readouterr().out) == is_short
        config = DataConfig(source=str(out), cache_dir=tmp_path / "cache")
        assert open_corpus([out], config, 8).notes == ((note,) if is_short else ())
    assert sizes[1] == 260 < sizes[0] < 8192
