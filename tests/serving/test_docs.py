"""What docs/serving.md shows runs, and says what it says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
HERE = "http://127.0.0.1:8000"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def kind_of(value):
    """A value's form: keys, and kinds of what is in it."""
    if isinstance(value, dict):
        return {name: kind_of(one) for name, one in value.items()}
    return [kind_of(value[0])] if isinstance(value, list) else type(value)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_lines_of_curl_have_answers_of_the_form_that_is_shown(url):
    asked = [block for block in blocks("bash") if block.startswith("curl")]
    shown = [json.loads(block) for block in blocks("json")]
    assert len(asked) == 2
    for line, example in zip(asked, shown, strict=False):
        answer = subprocess.run(["bash", "-c", line.replace(HERE, url)], capture_output=True, text=True, check=True)
        assert kind_of(json.loads(answer.stdout)) == kind_of(example)


def test_the_python_of_the_page_runs(url, served, tmp_path, monkeypatch, capsys):
    pytest.importorskip("cohere", reason="the extra 'test'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(served, tmp_path / "runs" / "first")
    for block in blocks("python"):
        exec(block.replace(HERE, url), {})
    assert len(capsys.readouterr().out.split()) == 2
    assert (tmp_path / "for-others" / "README.md").is_file()


def test_every_option_is_in_the_table():
    from dataclasses import fields

    from flexrec.serving.options import ServeOptions

    rows = re.findall(r"^\| (`--.*?`) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    named = dict(zip(re.findall(r"--[\w-]+", " ".join(name for name, _ in rows)), _defaults(rows), strict=True))
    assert named == {
        f"--{one.name.replace('_', '-')}": f"{one.default:g}" if one.name != "host" else one.default
        for one in fields(ServeOptions)
    } | {"--max-body": str(ServeOptions().max_body)}


def _defaults(rows):
    return [default for _, defaults in rows for default in defaults.split(", ")]
