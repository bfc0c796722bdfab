"""The examples of the README run and show what they say."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="the tests run away from the source tree")
def test_the_examples_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(programs) == 2
    names = {}
    for program in programs:
        exec(program, names)
    assert (tmp_path / "memory.safetensors").is_file()
    assert names["again"].losses.mean() < 0.9 * names["scan"].losses.mean(), "the second reading is answered better"
