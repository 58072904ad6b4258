import json
import re
import signal
import sys
import urllib.request


def test_the_server_answers_and_ends_on_an_interrupt(tta_process):
    process = tta_process("serve-moderation", "--port", "0")
    address = next(found for line in process.stderr if (found := re.search(rb"http://127\.0\.0\.1:\d+", line)))
    body = json.dumps({"input": ["Water the tomatoes.", "Hello"]}).encode()
    request = urllib.request.Request(
        f"{address[0].decode()}/v1/moderations", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        results = json.load(response)["results"]
    assert [result["flagged"] for result in results] == [False, False]
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0


def test_a_server_without_its_extra_names_the_command(tta, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "tta_middleware.moderation.server", raising=False)
    ran = tta("serve-moderation")
    assert ran.code == 1
    assert re.search(r"pip install .tta-middleware\[server\]", ran.err)
