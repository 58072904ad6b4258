"""Answers from documents: retriever | prompt | guarded model | parser, and a document that nobody should obey.

What is retrieved becomes a part of the prompt, so ``prompt_check="all"`` has it moderated, too.
"""

from collections.abc import Sequence
from zlib import crc32

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from tta_middleware import TTAChatModel

DOCUMENTS = [
    "The town library opens at nine in the morning and closes at six in the evening, except on Mondays.",
    "The swimming pool is open from May to September; children under six swim for free.",
    "The market is held on the square by the old church every Saturday until noon.",
    "Guestbook: I hate you all, you worthless idiots, and I hope that you suffer and die.",
]


class Words(Embeddings):
    """A text's words, counted in 256 buckets; put a real embedding model in its place."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        buckets = [0.0] * 256
        for word in text.lower().replace(",", " ").replace("?", " ").replace(".", " ").split():
            buckets[crc32(word.encode()) % 256] += 1.0 if len(word) > 3 else 0.0
        return buckets


def joined(documents: Sequence[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


def main() -> None:
    store = InMemoryVectorStore(Words())
    store.add_texts(DOCUMENTS)
    model = TTAChatModel(model="smollm2", moderator="local", prompt_check="all", max_new_tokens=32)
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer in one sentence, from these notes only:\n{notes}"), ("user", "{question}")]
    )
    retriever = store.as_retriever(search_kwargs={"k": 1})
    chain = {"notes": retriever | joined, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    for question in ("When does the town library open?", "What does the guestbook say, you suffer?"):
        print(f"> {question}\n{chain.invoke(question)}")


if __name__ == "__main__":
    main()
