from pathlib import Path

from gpt.configs.fields import list_flags
from gpt.configs.reference import MEANINGS, format_reference
from gpt.configs.resume_rule import ResumeRule
from gpt.configs.train_config import TrainConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_configuration_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == format_reference(), "run: python -m gpt.configs.reference > docs/configuration.md"


def test_configuration_page_has_a_row_for_every_flag_and_rule() -> None:
    page = format_reference()
    flags = [flag for flag in list_flags(TrainConfig) if "no-" not in flag]
    assert [flag for flag in flags if page.count(f"| `{flag}`") != 1] == []
    assert set(MEANINGS) == set(ResumeRule)
