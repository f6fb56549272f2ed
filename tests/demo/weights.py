"""Weight space: two LoRAs become one, ranks fall, and what was collapsed into a base is extracted again."""

from __future__ import annotations

from hubtool.pipelines.tiny import build
from tests.demo.stage import OUT, run, say
from tests.support.adapters import write
from tests.support.tiny import make

BASE = OUT / "base"  # a whole Stable Diffusion pipeline of a few megabytes; ``pictures`` and ``training`` go on with it


def show() -> None:
    pipe = build("sd1")
    pipe.save_pretrained(BASE)
    first, second = (OUT / f"{name}.safetensors" for name in ("style", "detail"))
    write(make(pipe, family="sd1").adapter, first, "kohya")
    write(make(pipe, family="sd1", ranks=(2, 8), seed=2).adapter, second, "diffusers")
    say("Merge two LoRAs of different layouts exactly, then take the ranks down and see what that costs")
    merged, small = OUT / "merged.safetensors", OUT / "small.safetensors"
    run("merge", f"{first}=0.7", f"{second}=0.4", "-o", merged)
    run("resize", merged, "--rank", "4", "-o", small)
    run("diff", merged, small, ends=(1,))  # as diff does where files differ
    say("Collapse it into the base, check the numbers, and extract it again")
    run("collapse", BASE, merged, "-o", OUT / "collapsed", "--check")
    run("extract", BASE, OUT / "collapsed", "--rank", "16", "-o", OUT / "extracted.safetensors")
    run("recipe", "show", OUT / "extracted.safetensors")
