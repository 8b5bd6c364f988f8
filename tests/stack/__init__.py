"""The memory model against the real code: TRL, transformers, PEFT, bitsandbytes."""
