"""What clients get from a guarded server, in their own words; the page is docs/results/clients.md.

    python -m venv v2 && v2/bin/pip install "openai<3"
    mkdir js && cd js && npm init -y && npm install openai
    python benchmarks/client_transcripts.py --openai2 v2/bin/python --node js > docs/results/clients.md

The model is scripted: a calm answer, one that is flagged late and blocked, and a call of a tool.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from served import ServerProcess, Setup

OPENAI = """
import asyncio, openai
print("openai", openai.__version__)
def ask(text, **more):
    return dict(model="roses", messages=[{"role": "user", "content": text}], **more)
with openai.OpenAI() as api:
    for text in ("Roses?", "An attack, please."):
        choice = api.chat.completions.create(**ask(text)).choices[0]
        print("sync:", choice.finish_reason, repr(choice.message.content[:60]), choice.message.refusal)
    chunks = list(api.chat.completions.create(**ask("An attack, please.", stream=True)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    print("stream:", len(chunks), "chunks,", repr(text[:40]), "...", repr(text[-33:]), end=" ")
    print(chunks[-1].choices[0].finish_reason)
    response = api.responses.create(model="roses", input="An attack, please.")
    print("responses:", response.status, response.incomplete_details.reason, response.output[0].content[0].type)
async def main():
    async with openai.AsyncOpenAI() as api:
        stream = await api.chat.completions.create(**ask("Roses?", stream=True))
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        print("async stream:", repr(text[:60]))
        async with await api.responses.create(model="roses", input="Roses?", stream=True) as events:
            kinds = [event.type async for event in events]
        print("async responses:", len(kinds), "events,", kinds[0], "...", kinds[-1])
    try:
        openai.OpenAI(max_retries=0).chat.completions.create(**ask("Roses?", logprobs=True))
    except openai.BadRequestError as error:
        print("refused:", error.status_code, error.code, error.param)
asyncio.run(main())
"""

LANGCHAIN = """
import langchain_openai, importlib.metadata
from langchain_openai import ChatOpenAI
print("langchain-openai", importlib.metadata.version("langchain-openai"))
chat = ChatOpenAI(model="roses")
print("invoke:", repr(chat.invoke("Roses?").text[:60]))
chunks = list(chat.stream("An attack, please."))
whole = chunks[0]
for chunk in chunks[1:]:
    whole += chunk
print("stream:", len(chunks), "chunks,", repr(whole.text[:40]), whole.response_metadata["finish_reason"])
new = ChatOpenAI(model="roses", use_responses_api=True).invoke("Roses?")
print("responses:", repr(new.text[:60]), new.response_metadata["status"])
"""

NODE = """
const OpenAI = require("openai");
const {VERSION} = require("openai/version");
(async () => {
  console.log("openai (npm)", VERSION, "node", process.version);
  const api = new OpenAI({maxRetries: 0});
  const ask = (text, more) => ({model: "roses", messages: [{role: "user", content: text}], ...more});
  const whole = await api.chat.completions.create(ask("Roses?"));
  console.log("await:", whole.choices[0].finish_reason, JSON.stringify(whole.choices[0].message.content.slice(0, 60)));
  let text = "", reason = null;
  for await (const chunk of await api.chat.completions.create(ask("An attack, please.", {stream: true}))) {
    text += chunk.choices[0]?.delta?.content ?? "";
    reason = chunk.choices[0]?.finish_reason ?? reason;
  }
  console.log("stream:", JSON.stringify(text.slice(0, 40)), "...", JSON.stringify(text.slice(-33)), reason);
  const response = await api.responses.create({model: "roses", input: "An attack, please."});
  console.log("responses:", response.status, response.incomplete_details.reason, response.output[0].content[0].type);
  const stream = api.responses.stream({model: "roses", input: "Roses?"});
  console.log("responses stream:", JSON.stringify((await stream.finalResponse()).output_text.slice(0, 60)));
  const several = await api.chat.completions.create(ask("Roses?", {n: 2}));
  console.log("n: 2:", several.choices.map((choice) => `${choice.index} ${choice.finish_reason}`).join(", "));
  try { await api.chat.completions.create(ask("Roses?", {logprobs: true})); }
  catch (error) { console.log("refused:", error.status, error.code, error.param); }
})();
"""

CURL = (
    'curl -sN $OPENAI_BASE_URL/chat/completions -d \'{"model": "roses", "stream": true, "messages": '
    '[{"role": "user", "content": "An attack, please."}]}\' | cut -c 1-230 | tail -n 7'
)


def ran(command: Sequence[str], url: str, folder: Path | None = None) -> str:
    """What a client printed."""
    environment = os.environ | {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout.strip() + ("" if done.returncode == 0 else f"\nFAILED: {done.stderr.strip()[-300:]}")


def in_file(code: str, suffix: str, folder: Path) -> Path:
    """Code as a file that an interpreter takes."""
    file = folder / f"client{suffix}"
    file.write_text(code, encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai2", type=Path, help="a Python with openai 2")
    parser.add_argument("--node", type=Path, help="a folder in which npm has installed openai")
    args = parser.parse_args()
    told: dict[str, str] = {}
    with ServerProcess(Setup("guarded", 0.0, 0.0)) as server, tempfile.TemporaryDirectory() as name:
        file = in_file(OPENAI, ".py", Path(name))
        told["openai 3, Python"] = ran([sys.executable, str(file)], server.url)
        if args.openai2:
            told["openai 2, Python"] = ran([str(args.openai2.absolute()), str(file)], server.url)
        told["LangChain's ChatOpenAI"] = ran([sys.executable, str(in_file(LANGCHAIN, ".py", Path(name)))], server.url)
        if args.node:
            script = in_file(NODE, ".cjs", args.node)
            told["openai, JavaScript"] = ran(["node", script.name], server.url, args.node)
        told[f"curl\n\n    {CURL}"] = ran(["bash", "-c", CURL], server.url)
    print("# Clients\nBy `benchmarks/client_transcripts.py`, against a scripted model behind the guard.\n")
    for client, words in told.items():
        print(f"## {client}\n```\n{words}\n```\n")


if __name__ == "__main__":
    main()
