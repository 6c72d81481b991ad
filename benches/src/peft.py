"""Merges an adapter with PEFT and prints what each phase took, as JSON."""

import json
import resource
import sys
import time

start = time.perf_counter()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, out = sys.argv[1:]
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter)
loaded = time.perf_counter()
model = model.merge_and_unload()
merged = time.perf_counter()
model.save_pretrained(out)
saved = time.perf_counter()
print(
    json.dumps(
        {
            "import": imported - start,
            "load": loaded - imported,
            "merge": merged - loaded,
            "save": saved - merged,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
