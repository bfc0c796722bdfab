"""The example of the README runs and shows what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="the tests run away from the source tree")
def test_the_example_of_the_readme():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(program, names)
    assert names["again"].losses.mean() < 0.9 * names["scan"].losses.mean(), "the second reading is answered better"
