"""Ask a model a question with its adapter switched off and on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_NEW_TOKENS = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a question got before and after training."""

    question: str
    before: str
    after: str


def compare_answers(model_folder: Path, adapter: Path, questions: Sequence[str]) -> list[Answer]:
    """Answer each question greedily, on the CPU in float32, without and with the adapter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    # Neither a bar that flashes by nor notes to authors of libraries are for the person.
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Imports bitsandbytes, which talks as it is imported.
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    model = PeftModel.from_pretrained(base, str(adapter)).eval()

    def answer(question: str) -> str:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return " ".join(tokenizer.decode(new, skip_special_tokens=True).split())

    found = []
    for question in questions:
        with model.disable_adapter():
            before = answer(question)
        found.append(Answer(question=question, before=before, after=answer(question)))
    return found
