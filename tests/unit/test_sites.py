# SPDX-License-Identifier: Apache-2.0
"""The table of call sites, against the installed megatron-core and damaged copies of it."""

import shutil
from pathlib import Path

import pytest

from megatron_sp_fix import UnsupportedMegatronError, sites


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that the table reads."""
    installed = sites.installed_root()
    for path in {site.path for site in sites.SITES} | {"megatron/core/package_info.py"}:
        if (installed / path).is_file():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed / path, tmp_path / path)
    return tmp_path


def set_version(tree: Path, release: str):
    major, minor, patch = release.split(".")
    (tree / "megatron/core/package_info.py").write_text(
        f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\n"
    )


def test_installed_release_is_recognized():
    root = sites.installed_root()
    found = {match.site.role: match for match in sites.find(root)}
    assert found.keys() >= {"GPT decoder", "hybrid decoder", "MTP"}
    release = sites.version(root)
    assert ("MTP single step" in found) == (release >= (0, 17))
    assert (found["GPT decoder"].form == "native") == (release >= (0, 19))
    for match in found.values():
        assert match.parameters[:2] in (
            ("input_ids", "position_ids"),
            ("hidden_states", "next_token_ids"),
        )


def test_unrecognized_site_is_named(tree):
    for site in sites.SITES:
        path = tree / site.path
        if site.role == "MTP" and path.is_file():
            text = path.read_text()
            path.write_text(text.replace("decoder_input = embedding(", "decoder_input = embed("))
    with pytest.raises(UnsupportedMegatronError, match=r"multi_token_prediction.py: \w+\.\w+"):
        sites.find(tree)


def test_missing_file_is_named(tree):
    (tree / "megatron/core/models/gpt/gpt_model.py").unlink()
    with pytest.raises(UnsupportedMegatronError, match=r"gpt_model.py: GPTModel"):
        sites.find(tree)


def test_no_tree(tmp_path):
    with pytest.raises(UnsupportedMegatronError, match="no megatron-core source tree at"):
        sites.version(tmp_path)


def test_no_version(tree):
    (tree / "megatron/core/package_info.py").write_text("")
    with pytest.raises(UnsupportedMegatronError, match="does not state MAJOR"):
        sites.version(tree)


@pytest.mark.parametrize("release", ["0.11.0", "0.12.0", "0.19.2", "0.20.0"])
def test_supported_range(tree, release, recwarn):
    from megatron_sp_fix import runtime

    set_version(tree, release)
    if release == "0.11.0":
        with pytest.raises(UnsupportedMegatronError, match=r"0\.11\.0 at .* older than 0\.12"):
            runtime._supported(tree)
        return
    assert len(runtime._supported(tree)) >= 3
    newer = [w for w in recwarn if "newer than 0.19" in str(w.message)]
    assert len(newer) == (release == "0.20.0")


def test_newer_release_that_is_not_recognized(tree):
    from megatron_sp_fix import runtime

    set_version(tree, "0.20.0")
    (tree / "megatron/core/models/gpt/gpt_model.py").write_text("class GPTModel: ...\n")
    with pytest.raises(UnsupportedMegatronError, match=r"0\.20\.0.*GPTModel\._preprocess"):
        runtime._supported(tree)
