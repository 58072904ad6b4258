"""A guarded model inside an ordinary chain: prompt | model | parser."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from tta_middleware import TTAChatModel

model = TTAChatModel(model="smollm2", moderator="local", max_new_tokens=48)
prompt = ChatPromptTemplate.from_messages([("system", "Answer in one sentence."), ("user", "{question}")])
chain = prompt | model | StrOutputParser()

if __name__ == "__main__":
    print(chain.invoke({"question": "Why do cats purr?"}))

    message = model.invoke("Why do cats purr?", policy=0.3)
    print(message.response_metadata["tta"]["outcome"], message.usage_metadata)
