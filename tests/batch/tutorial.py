"""OpenAI's batch tutorial, word for word but for the base URL, the model and the audio: a client's program.

python tutorial.py BASE_URL KEY
"""

import json
import sys
import time

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2])

batch_input_file = client.files.create(file=open("batchinput.jsonl", "rb"), purpose="batch")  # noqa: SIM115, PTH123

batch = client.batches.create(
    input_file_id=batch_input_file.id,
    endpoint="/v1/chat/completions",
    completion_window="24h",
    metadata={"description": "nightly eval job"},
)

while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.2)

file_response = client.files.content(batch.output_file_id)
print(  # noqa: T201
    json.dumps(
        {
            "batch": batch.model_dump(),
            "lines": [json.loads(each) for each in file_response.text.splitlines()],
            "listed": [each.id for each in client.batches.list(limit=10)],
            "files": [each.purpose for each in client.files.list()],
            "deleted": client.files.delete(batch_input_file.id).deleted,
        }
    )
)
