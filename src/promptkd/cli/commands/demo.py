"""`promptkd demo`."""

from typing import Any

from promptkd.cli.options.demo import Options
from promptkd.cli.outputs import RunFolder
from promptkd.cli.parsing.parser import merged_config
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.demo.pipeline import Demo, DemoSettings, teacher_file
from promptkd.io.atomic import write_atomic
from promptkd.memory import peak_memory
from promptkd.report import render_report, terminal_table


def run(options: Options, training: dict[str, Any]) -> None:
    quiet_libraries()
    teacher_file()
    folder = RunFolder(options.out, merged_config(options, {}), resume=None, overwrite=options.overwrite)
    folder.check()
    with folder.locked():
        with folder.opened():
            demo = Demo(DemoSettings(layers=options.layers, steps=options.steps, seed=options.seed), options.out, say)
        for line in demo.plan():
            say(line)
        results = demo.run()
        results.notes.append(f"Peak memory {peak_memory() / 2**30:.1f} GiB.")
        results.write(folder.results)
        write_atomic(folder.report, render_report([results], title="promptkd demo"))
    print(terminal_table([results]))
    say(f"The student is in {options.out / 'student'}, the soft prompt in {options.out / 'prompt'}.")
    say(f"Open {folder.report} in a browser.")
    for line in demo.try_next():
        say(line)
