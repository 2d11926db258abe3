"""Where things are kept: who has the last word, and which ``.autoglm`` is the project's."""

from __future__ import annotations

from pathlib import Path

import pytest

from open_autoglm.errors import UserError
from open_autoglm.settings import HOME_NAME, Settings, find_home


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project as the current directory, and an environment that says nothing."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"AUTOGLM_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_argument_beats_environment_beats_dotenv_beats_default(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source is asked only if the one before it is silent."""
    assert Settings().prefect_port == 4200
    (project / ".env").write_text("AUTOGLM_PREFECT_PORT=4301\nSOMETHING_ELSE=1\n")
    assert Settings().prefect_port == 4301
    monkeypatch.setenv("AUTOGLM_PREFECT_PORT", "4302")
    assert Settings().prefect_port == 4302
    assert Settings(prefect_port=4303).prefect_port == 4303


def test_home_is_found_from_anywhere_inside_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like git's: the nearest directory of that name at or above the current one."""
    inside = project / "deep" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert find_home() == inside / HOME_NAME  # none yet: it will be made here
    (project / HOME_NAME).mkdir()
    assert find_home() == project / HOME_NAME
    (project / "deep" / HOME_NAME).mkdir()
    assert Settings().home == project / "deep" / HOME_NAME


def test_home_is_absolute_however_it_was_given(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children and servers run elsewhere, so no path may depend on the current directory."""
    monkeypatch.setenv("HOME", str(project / "me"))
    assert Settings(home=Path("here")).home == project / "here"
    assert Settings(home=Path("~/kept")).home == project / "me" / "kept"
    assert Settings(home=Path("here")).mlflow_uri == f"sqlite:///{project}/here/mlflow.db"


def test_what_is_kept_at_home_is_shown_from_there_on(tmp_path: Path) -> None:
    """A log is read in a browser, too, where the directories above say nothing."""
    settings = Settings(home=tmp_path / HOME_NAME)
    assert settings.shown(settings.studies / "one") == Path(HOME_NAME, "studies", "one")
    assert settings.shown(Path("/elsewhere/one")) == Path("/elsewhere/one")


def test_a_tracking_server_replaces_the_database() -> None:
    """The database inside home is used only if no address is given."""
    assert Settings(tracking_uri="http://127.0.0.1:5000").mlflow_uri == "http://127.0.0.1:5000"


def test_a_wrong_variable_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings come from a person, so a mistake in them is a user error."""
    monkeypatch.setenv("AUTOGLM_PREFECT_PORT", "http")
    with pytest.raises(UserError, match="AUTOGLM_PREFECT_PORT") as caught:
        Settings()
    assert "\n" not in str(caught.value)
    assert "'http'" in str(caught.value)


def test_looking_for_home_makes_nothing(project: Path) -> None:
    """Only what writes there creates it."""
    assert not Settings().home.exists()
    assert list(project.iterdir()) == []
