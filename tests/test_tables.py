"""Tuned tables: which entry answers, what a user's own tables change, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_port import info, settings
from nsa_port.kernels import tables
from nsa_port.kernels.tables import TableError, load_table, tuned, tuned_to

VALUES = {
    "BLOCK_M": 32, "BLOCK_N": 128, "OWN_N": 64, "least_sharing": 2, "num_warps": 2, "num_stages": 4,
}  # fmt: skip
ENTRY = {"element_size": 2, "head_dim": 128, **VALUES}


def write(folder: Path, arch: str, kernels: Any, **more: Any) -> None:
    content = {"architecture": arch, "kernels": kernels, **more}
    (folder / f"{arch}.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NSA_PORT_TABLES", str(tmp_path))
    return tmp_path


def every_shipped_table() -> list[str]:
    return sorted(path.stem for path in tables.SHIPPED.glob("*.json"))


def test_the_variable_is_one_that_users_are_told_of() -> None:
    assert tables.FOLDER_VARIABLE in settings.VARIABLES


@pytest.mark.parametrize("arch", every_shipped_table())
def test_every_shipped_table_would_be_taken_from_a_user_too(arch: str) -> None:
    kernels = tables.read_table(tables.SHIPPED / f"{arch}.json", arch)
    assert kernels == tables.shipped_table(arch)


@pytest.mark.parametrize("arch", every_shipped_table())
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("dim", [16, 80, 128, 192, 256])
def test_every_architecture_answers_for_every_head(arch: str, element_size: int, dim: int) -> None:
    for kernel in tables.shipped_table(arch):
        if kernel.startswith("hopper"):
            continue  # for some heads only, beside a kernel for every head
        values = tuned(arch, kernel, element_size, dim)
        assert values["num_warps"] >= 1
        assert not set(values) & set(tables.CONDITIONS)


def test_a_head_beyond_every_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="interval_forward: no entry for head dimension 512"):
        tuned("sm_90", "interval_forward", 2, 512)


def test_an_unknown_architecture_takes_the_generic_entries() -> None:
    assert load_table("sm_77") == load_table("generic") == load_table("")


def test_an_unknown_amd_architecture_never_takes_nvidias_entries() -> None:
    assert load_table("gfx1234") == load_table("generic_gfx") != load_table("generic")


def test_an_entry_of_the_users_folder_comes_first(folder: Path) -> None:
    write(folder, "sm_90", {"selected_by_query": [ENTRY]})
    found = tuned("sm_90", "selected_by_query", 2, 128)
    assert found == VALUES


def test_an_entry_of_the_users_folder_changes_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        folder,
        "sm_90",
        {"selected_by_query": [{**ENTRY, "head_dim": 192, "exact_dims": [[192, 192]]}]},
    )
    calls = [
        (arch, kernel, size, dim)
        for arch in ("sm_90", "sm_80", "")
        for kernel in ("selected_by_query", "interval_forward")
        for size in (2, 4)
        for dim in (64, 128, 192, 256)
    ]
    with_folder = {call: tuned(*call) for call in calls}
    monkeypatch.delenv("NSA_PORT_TABLES")
    differing = [call for call in calls if with_folder[call] != tuned(*call)]
    assert differing == [("sm_90", "selected_by_query", 2, 192)]


def test_an_entry_with_exact_dims_is_for_these_alone(folder: Path) -> None:
    write(folder, "sm_90", {"selected_by_query": [{**ENTRY, "exact_dims": [[128, 64]]}]})
    assert tuned("sm_90", "selected_by_query", 2, 128, 64)["BLOCK_N"] == 128
    for dims in ((128, 128), (128,), (64, 128), (64, 64)):
        assert tuned("sm_90", "selected_by_query", 2, *dims)["BLOCK_N"] != 128


def test_setting_the_variable_takes_effect_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "sm_90", {"selected_by_query": [ENTRY]})
    before = tuned("sm_90", "selected_by_query", 2, 128)
    monkeypatch.setenv("NSA_PORT_TABLES", str(tmp_path))
    assert tuned("sm_90", "selected_by_query", 2, 128)["BLOCK_N"] == 128 != before["BLOCK_N"]
    monkeypatch.delenv("NSA_PORT_TABLES")
    assert tuned("sm_90", "selected_by_query", 2, 128) == before


def test_the_files_that_answer_are_told(folder: Path) -> None:
    write(folder, "sm_90", {"selected_by_query": [ENTRY]})
    assert tables.files("sm_90") == (folder / "sm_90.json", tables.SHIPPED / "sm_90.json")
    assert tables.files("sm_77") == (tables.SHIPPED / "generic.json",)


def test_info_tells_what_is_wrong_with_a_table(folder: Path) -> None:
    assert info._tables("sm_80") == [str(tables.SHIPPED / "sm_80.json")]
    write(folder, "sm_90", {"selected_by_quarry": []})
    assert "no kernel is called 'selected_by_quarry'" in info._tables("sm_90")[0]
    assert info._tables("") == []


def test_a_folder_that_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSA_PORT_TABLES", str(tmp_path / "none"))
    with pytest.raises(TableError, match=r"NSA_PORT_TABLES=.*none is not a folder"):
        tuned("sm_90", "selected_by_query", 2, 128)


@pytest.mark.parametrize(
    ("kernels", "fault"),
    [
        ([], "it has no object 'kernels'"),
        ({"selected_by_quarry": [ENTRY]}, "no kernel is called 'selected_by_quarry'; there are"),
        ({"selected_by_query": ENTRY}, "selected_by_query is not a list of entries"),
        ({"selected_by_query": [ENTRY, 3]}, "selected_by_query, entry 1: 3 is not an object"),
        ({"selected_by_query": [{**ENTRY, "BLOCK_K": 16}]}, "nobody reads BLOCK_K; the names are"),
        ({"selected_by_query": [{"element_size": 2}]}, "BLOCK_N, OWN_N, head_dim, least"),
        ({"selected_by_query": [{**ENTRY, "BLOCK_N": 48}]}, "BLOCK_N must be a power of two"),
        ({"selected_by_query": [{**ENTRY, "BLOCK_N": 8}]}, "BLOCK_N must be at least 16"),
        ({"selected_by_query": [{**ENTRY, "num_warps": 0}]}, "num_warps must be positive, got 0"),
        ({"selected_by_query": [{**ENTRY, "num_warps": 3}]}, "num_warps must be a power of two"),
        ({"selected_by_query": [{**ENTRY, "num_stages": "2"}]}, "must be an integer, got '2'"),
        ({"selected_by_query": [{**ENTRY, "exact_dims": [64, 64]}]}, "must be pairs of key and"),
        ({"selected_by_query": [{**ENTRY, "num_stages": True}]}, "must be an integer, got True"),
    ],
)
def test_a_bad_table_is_refused_with_its_fault(folder: Path, kernels: Any, fault: str) -> None:
    write(folder, "sm_90", kernels)
    with pytest.raises(TableError) as caught:
        tuned("sm_90", "selected_by_query", 2, 128)
    assert fault in str(caught.value)
    assert str(folder / "sm_90.json") in str(caught.value)


def test_text_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "sm_90.json").write_text("{")
    with pytest.raises(TableError, match=r"sm_90\.json is not a table: "):
        tuned("sm_90", "selected_by_query", 2, 128)


def test_a_table_of_another_architecture_is_refused(folder: Path) -> None:
    write(folder, "sm_80", {})
    (folder / "sm_80.json").rename(folder / "sm_90.json")
    with pytest.raises(TableError, match="is for 'sm_80', not for 'sm_90'"):
        tuned("sm_90", "selected_by_query", 2, 128)


def test_values_can_be_laid_over_the_tables_and_taken_back() -> None:
    before = tuned("sm_90", "selected_by_query", 2, 128)
    with tuned_to({"selected_by_query": {"BLOCK_N": 16}}):
        assert tuned("sm_90", "selected_by_query", 2, 128) == {**before, "BLOCK_N": 16}
        with tuned_to({"selected_by_query": {"num_warps": 8}}):
            inner = tuned("sm_90", "selected_by_query", 2, 128)
            assert inner == {**before, "BLOCK_N": 16, "num_warps": 8}
        assert tuned("sm_90", "selected_by_query", 2, 128)["num_warps"] == before["num_warps"]
    assert tuned("sm_90", "selected_by_query", 2, 128) == before
