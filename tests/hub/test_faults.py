"""Every way in which a Hub can refuse or break off."""

from __future__ import annotations

import re

import pytest
from hub.client import Client, refused, snapshot
from hub.fake_hub import TOKEN, Fault

UPLOAD = "^PUT /_storage/"


def test_a_connection_lost_in_the_middle_of_a_file_is_tried_again(hub, client, model):
    hub.objects.clear()
    hub.faults.append(Fault("PUT", "/_storage/", cut=True))
    done = client.qdiff("push", model, "someone/cut-once")
    assert done.code == 0, done.err
    assert len(hub.requests(UPLOAD)) == 3
    assert hub.files("someone/cut-once").items() > snapshot(model).items()


def test_a_download_that_breaks_off_is_tried_again(hub, client, model):
    assert client.qdiff("push", model, "someone/broken-off").code == 0
    hub.faults.append(Fault("GET", "/_storage/", cut=True))
    done = client.qdiff("inspect", "someone/broken-off")
    assert done.code == 0, done.err
    assert len(hub.requests("^GET /_storage/")) == 3


def test_a_download_that_breaks_off_continues_at_the_byte_where_it_broke(hub, client, model):
    """huggingface_hub does it; this pins that our way of asking lets it."""
    assert client.qdiff("push", model, "someone/continued").code == 0
    client.run("import huggingface_hub; usual = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE")
    client.run("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 512")
    hub.log.clear()
    hub.faults.append(Fault("GET", "/_storage/", cut=True))
    try:
        done = client.qdiff("inspect", "someone/continued")
    finally:
        client.run("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = usual")
    assert done.code == 0, done.err
    (asked,) = [re.search(r"bytes=(\d+)-", line) for line in hub.requests("^GET /_storage/.*bytes=[1-9]")]
    assert int(asked[1]) > 1000


def test_files_that_have_arrived_are_not_fetched_again(hub, client, model):
    assert client.qdiff("push", model, "someone/two-files").code == 0
    hub.log.clear()
    hub.faults.append(Fault("GET", "/_storage/", status=403, message="expired", skip=1))
    done = client.qdiff("inspect", "someone/two-files")
    assert done.code == 2 and "Traceback" not in done.err, done.err
    fetched = len(hub.requests("^GET /_storage/"))
    hub.log.clear()
    assert client.qdiff("inspect", "someone/two-files").code == 0
    assert fetched == 2 and len(hub.requests("^GET /_storage/")) == 1


def test_with_xet_switched_on_an_endpoint_without_it(hub, model, tmp_path):
    """Downloads go the ordinary way; uploads say how to."""
    with Client(hub.url, tmp_path, HF_HUB_DISABLE_XET="0") as xet:
        if xet.run("import hf_xet").code:
            pytest.skip("hf_xet is not installed")
        assert "HF_HUB_DISABLE_XET=1" in refused(xet, model, "someone/with-xet")
        assert len(hub.repos["someone/with-xet"].commits) == 1
        done = xet.qdiff("inspect", "someone/two-files")
        assert done.code == 0, done.err


def test_a_second_push_resumes_where_the_first_was_stopped(hub, client, model):
    hub.objects.clear()
    hub.faults.append(Fault("PUT", "/_storage/", status=403, message="Signature expired", skip=1))
    line = refused(client, model, "someone/stopped")
    assert "Signature expired" in line
    assert len(hub.repos["someone/stopped"].commits) == 1, "half a checkpoint was committed"
    assert len(hub.objects) == 1
    hub.log.clear()
    assert client.qdiff("push", model, "someone/stopped").code == 0
    assert len(hub.requests(UPLOAD)) == 1
    assert hub.files("someone/stopped").items() > snapshot(model).items()


def test_no_hub_at_all(client, model):
    client.run("import huggingface_hub; there = huggingface_hub.constants.ENDPOINT")
    client.run("huggingface_hub.constants.ENDPOINT = 'http://127.0.0.1:9'")
    try:
        line = refused(client, model, "someone/unreachable")
    finally:
        client.run("huggingface_hub.constants.ENDPOINT = there")
    assert "the connection to the Hub failed" in line and "run the same command again" in line


def test_a_token_that_is_not_accepted(hub, client, model):
    client.run("import os; os.environ['HF_TOKEN'] = 'hf_of_nobody'")
    try:
        line = refused(client, model, "someone/wrong-token")
    finally:
        client.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")
    assert "does not accept your token" in line and "hf auth login" in line
    assert "someone/wrong-token" not in hub.repos


def test_no_token(client, model):
    client.run("import os; del os.environ['HF_TOKEN']")
    try:
        assert "hf auth login" in refused(client, model, "someone/no-token")
    finally:
        client.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")


def test_a_name_of_someone_else(hub, client, model):
    line = refused(client, model, "someoneelse/model")
    assert "may not write to someoneelse/model" in line and "namespace" in line


def test_too_many_requests_are_waited_for(hub, client, model):
    hub.faults.append(Fault("POST", "/preupload/", status=429, message="slow down", headers={"Retry-After": "0"}))
    assert client.qdiff("push", model, "someone/patient").code == 0
    assert len(hub.requests("/preupload/")) == 2


def test_too_many_requests_for_good(hub, client, model):
    hub.faults.append(Fault("POST", "/api/repos/create", status=429, message="slow down", headers={"Retry-After": "77"}))
    line = refused(client, model, "someone/impatient")
    assert "too many requests" in line and "in 77 seconds" in line


@pytest.mark.parametrize(
    ("path", "status", "said", "told"),
    [
        ("/info/lfs/objects/batch", 403, "Private repository storage limit reached", "no space left for someone/full"),
        ("/commit/", 403, "Storage quota exceeded", "no space left for someone/full"),
        ("/commit/", 413, "Payload too large", "save with smaller shards"),
        ("/commit/", 412, "A commit has happened since", "changed by someone else at the same time"),
        ("/api/validate-yaml", 400, "x", "the Hub did not take someone/full"),
    ],
    ids=["lfs quota", "commit quota", "too large", "conflict", "card"],
)
def test_what_the_hub_refuses_is_said_in_one_line_and_nothing_is_committed(hub, client, model, path, status, said, told):
    hub.objects.clear()
    hub.faults.append(Fault("POST", path, status=status, message=said))
    line = refused(client, model, "someone/full")
    assert told in line and (said in line or status == 400)
    assert "someone/full" not in hub.repos or len(hub.repos["someone/full"].commits) == 1
