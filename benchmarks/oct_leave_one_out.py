"""ILM and BM of OCTLayers, each subject by a network that never saw it.

    python benchmarks/oct_leave_one_out.py --dataset_dir OCTLayers [--subjects 1 2]

One training of the default recipe per subject, on all others but one, which validates, and for a
fixed number of epochs: no epoch is chosen (`swa.pt`, the moving average at the end). Errors are
in px of the files' own frame, over all annotated columns; beside the default extraction stands the
original project's, on the same logits.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from pathlib import Path

import yaml

from pipeline.bundles import run_bundle
from pipeline.data.atomic import write_text

BUNDLE = "oct_layers"
MANIFEST = Path(__file__).resolve().parents[1] / "data_manifests" / "octlayers.yaml"
FIGURES = ("ilm_mae_px", "bm_mae_px", "transition_ilm_mae_px", "transition_bm_mae_px")


def main() -> None:
    options = _options()
    root = Path(options.output_dir)
    rows = []
    for subject in options.subjects:
        manifest = _manifest(root, subject)
        run = root / f"subject_{subject}"
        settings = {"dataset_dir": options.dataset_dir, "manifest": str(manifest), "threads": 1}
        run_bundle(
            BUNDLE,
            "train",
            output_dir=str(run),
            max_epochs=options.max_epochs,
            val_interval=options.max_epochs,
            **settings,
        )
        weights = run / "checkpoints" / "swa.pt"
        run_bundle(
            BUNDLE,
            "evaluate",
            output_dir=str(run),
            ckpt_path=str(weights),
            split="test",
            **settings,
        )
        text = (run / "evaluation" / "test" / "per_image_metrics.yaml").read_text("utf-8")
        scans = yaml.safe_load(text)
        rows += scans
        means = [statistics.fmean(scan[name] for scan in scans) for name in FIGURES]
        shown = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(FIGURES, means, strict=True))
        print(f"subject {subject}: {shown}", flush=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{len(rows)} B-scans, {used.ru_utime + used.ru_stime:.0f} CPU s")
    for name in FIGURES:
        values = [row[name] for row in rows]
        print(f"{name:24s} mean {statistics.fmean(values):.3f}  worst scan {max(values):.3f}")


def _manifest(root: Path, subject: int) -> Path:
    """Write the manifest of OCTLayers with `subject` as its test set; return its path."""
    content = yaml.safe_load(MANIFEST.read_text("utf-8"))
    train, test = content["files"]
    others = [number for number in range(1, 11) if number != subject]
    train["where"] = {"subject": f"Subject(?:{'|'.join(map(str, others))})"}
    test["where"] = {"subject": f"Subject{subject}"}
    content["validation"] = {"subjects": [f"Subject{others[0]}"]}  # its figures choose nothing
    path = root / f"without_{subject}.yaml"
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output_dir", default="runs/oct_leave_one_out")
    parser.add_argument("--subjects", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7])
    parser.add_argument("--max_epochs", type=int, default=15)
    return parser.parse_args()


if __name__ == "__main__":
    main()
