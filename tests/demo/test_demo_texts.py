from __future__ import annotations

import subprocess
import sys
import time

from spinecli.demo.language import split, surprisals
from spinecli.demo.texts import demo_documents, demo_text
from spinecli.demo.vocabulary import END


def test_sizes_and_speed() -> None:
    began = time.process_time()
    calibration, evaluation = demo_text("calibration"), demo_text("evaluation")
    assert time.process_time() - began < 1.5
    assert 50_000 < len(calibration.split()) < 70_000
    assert 15_000 < len(evaluation.split()) < 25_000


def test_one_story_on_each_line() -> None:
    lines = demo_text("evaluation").splitlines()
    stories = demo_documents("evaluation")
    assert lines == [story.text for story in stories]
    assert surprisals((*split(lines[7]), END)) == stories[7].surprisals


def test_splits_share_no_story() -> None:
    assert not set(demo_text("calibration").splitlines()) & set(demo_text("evaluation").splitlines())


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, spinecli.demo.texts; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
