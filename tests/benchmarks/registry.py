"""The measurements by name. Minutes: on two idle cores, with the default repeats."""

from __future__ import annotations

from tests.benchmarks.against_plain_ray import against_plain_ray
from tests.benchmarks.against_plain_search import against_plain_search
from tests.benchmarks.image_pipeline import image_pipeline
from tests.benchmarks.ledger_writing import ledger_writing
from tests.benchmarks.light_commands import light_commands, wide_plan
from tests.benchmarks.long_study import long_study
from tests.benchmarks.loop_overhead import averaging_overhead, loop_overhead
from tests.benchmarks.measuring import Measurement
from tests.benchmarks.ray_overhead import ray_overhead, ray_overhead_short
from tests.benchmarks.report_writing import report_writing
from tests.benchmarks.sharing import sharing, sharing_in_full, sharing_vit_s
from tests.benchmarks.simulator import simulator
from tests.benchmarks.whole_runs import embedded, smoke, whole_search

MEASUREMENTS = {
    "light": Measurement("--help and --plan of the embedded default", light_commands, 5, 0.2),
    "wide-plan": Measurement("--plan of 10,000 cells", wide_plan, 5, 0.5),
    "ledger": Measurement("metrics into the ledger", ledger_writing, 5, 1),
    "report": Measurement("the report of 1,000 cells", report_writing, 5, 4),
    "images": Measurement("decoding once, reading from the cache, waiting", image_pipeline, 5, 3),
    "loop": Measurement("one cell against a plain PyTorch loop", loop_overhead, 5, 8),
    "averages": Measurement("five averaged copies against none", averaging_overhead, 5, 8),
    "sharing": Measurement("gain of sharing, one seed, half-length stages", sharing, 5, 15),
    "sharing-vit-s": Measurement("gain of sharing with an encoder of 22 million weights", sharing_vit_s, 3, 15),
    "sharing-full": Measurement("gain of sharing and equality of bits, 12 cells", sharing_in_full, 1, 15),
    "ray-short": Measurement("Ray with one slot over in-process, little training", ray_overhead_short, 5, 8),
    "ray": Measurement("Ray with one slot over in-process, the embedded ablation", ray_overhead, 3, 30),
    "plain-ray": Measurement("plain Ray Tune on the same 12 cells", against_plain_ray, 5, 40),
    "plain-search": Measurement(
        "plain Ray Tune with OptunaSearch, as many configurations", against_plain_search, 3, 30
    ),
    "simulator": Measurement("the scheduling policy on 1,000 cells and 64 GPUs, simulated", simulator, 10, 1),
    "long-study": Measurement("300 tiny cells through Ray: control plane, memory of the driver", long_study, 1, 8),
    "smoke": Measurement("the smallest honest run", smoke, 1, 1),
    "embedded": Measurement("the embedded ablation as users run it, and again", embedded, 1, 4),
    "search": Measurement("the embedded search of 20 trials, and its winners confirmed", whole_search, 1, 6),
}
