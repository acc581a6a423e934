"""The report and the review of a model that was fitted without a run."""

from __future__ import annotations

import base64
import html
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft import _storage
from keras_rsft.data._samples import DECISIONS, Correction
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import label_results

# Most suspicious samples whose pictures a page gets, and how many of these are large.
_PICTURES, _LARGE = 2_000, 250
_SMALL_SIDE, _LARGE_SIDE = 96, 320
_NOTEBOOK = 'pip install "keras_rsft[notebook]"'


def most_suspicious(ledger: Any, count: int) -> np.ndarray:
    """Returns samples, those whose label looks wrong first."""
    order = np.lexsort((-ledger.suspicion, -ledger.looks_wrong))
    return order[:count]


def names_of(ledger: Any, class_names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of the classes, numbers by default."""
    known = int(max(ledger.labels.max(), ledger.predicted.max())) + 1
    names = tuple(map(str, range(known) if class_names is None else class_names))
    if len(names) < known or len(set(names)) < len(names):
        raise InvalidArgument(
            f"`class_names` must be {known} different names, one for each label. "
            f"Received: {len(set(names))}."
        )
    return names


def jpegs(
    recorder: Any, rows: np.ndarray, images: Any, side: int = _SMALL_SIDE
) -> dict[int, bytes]:
    """Returns samples that are pictures as JPEG files, by index."""
    import tensorflow as tf

    from keras_rsft.data._images import shrunk_jpeg

    if images is None:
        found = recorder.inputs(rows)
    elif len(images) != len(recorder.ledger):
        raise InvalidArgument(
            f"`images` must be the {len(recorder.ledger):,} of the training samples, "
            f"in their order. Received: {len(images):,}."
        )
    else:
        found = {row: images[row] for row in rows.tolist()}
    pictures = {row: one for row, one in found.items() if _is_picture(one)}
    if not pictures:
        return {}
    # Of [0, 1], [-1, 1] or any other range all is shown; of bytes nothing is changed.
    low = min(float(np.nanmin(one)) for one in pictures.values())
    high = max(float(np.nanmax(one)) for one in pictures.values())
    encoded = {}
    for row, one in pictures.items():
        pixels = np.asarray(one)
        if pixels.dtype != np.uint8:
            scaled = (pixels.astype(np.float32) - low) / max(high - low, 1e-12)
            pixels = np.nan_to_num(255 * scaled).round().astype(np.uint8)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if (factor := side // max(pixels.shape[:2])) > 1:  # Not blurred.
            pixels = pixels.repeat(factor, 0).repeat(factor, 1)
        encoded[row] = shrunk_jpeg(tf.io.encode_png(pixels).numpy(), side)
    return encoded


def _is_picture(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, str, bytes)):
        return False
    values = np.asarray(value)
    channels = values.shape[-1] if values.ndim == 3 else 1
    return (
        values.ndim in (2, 3) and values.dtype.kind in "uif" and channels in (1, 3, 4)
    )


# Report -------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    model: Any,
    history: Any,
    recorder: Any,
    images: Any,
    class_names: Sequence[str] | None,
) -> None:
    """Writes what a report reads of a run."""
    ledger, quality = recorder.ledger, model.label_quality
    names = names_of(ledger, class_names)
    logs = {name: list(values) for name, values in _logs_of(history).items()}
    epochs = max(map(len, logs.values()))
    logs = {name: values for name, values in logs.items() if len(values) == epochs}
    policy, seen = model.policy, int(ledger.seen.sum())
    accepted = logs.get(
        "acceptance_rate", [float(ledger.accepted.sum() / max(seen, 1))]
    )
    sentence = f"The last epoch learnt from {100 * accepted[-1]:.1f} % of the samples."
    if quality is not None:
        sentence = quality.finding
    chosen = {
        name: value
        for name, value in policy.get_config().items()
        if isinstance(value, (int, float)) and name != "accept"
    }
    config = {
        "model": model.model.name,
        "optimizer": model.optimizer.name,
        "policy": {"name": type(policy).__name__} | chosen,
        "epochs": epochs,
        "versions": _storage.installed_versions(),
    }
    results = {"sentence": sentence, "acceptance_rate": accepted[-1]}
    if quality is not None:
        results["label_quality"] = label_results(quality, names, ("train",))
    _storage.write_json(folder / _storage.CONFIG_FILE, config)
    _storage.write_json(folder / _storage.RESULTS_FILE, results)
    _storage.write_json(folder / _storage.CLASSES_FILE, names)
    rows = zip(range(1, epochs + 1), *logs.values(), strict=True)
    tables = recorder.tables(names) | {
        _storage.METRICS_FILE: (("epoch", *logs), rows),
        _storage.SAMPLES_FILE: (("id", "split"), ((i, "train") for i in ledger.ids)),
    }
    for name, (header, lines) in tables.items():
        _storage.write_csv(folder / name, header, lines)
    first = most_suspicious(ledger, _PICTURES)
    packs = [(_storage.THUMBNAILS_FILE, jpegs(recorder, first, images))]
    if packs[0][1]:
        large = jpegs(recorder, first[:_LARGE], images, _LARGE_SIDE)
        packs.append((_storage.PREVIEWS_FILE, large))
    for name, pictures in packs:
        named = ((ledger.ids[row], one) for row, one in pictures.items())
        _storage.write_pack(folder / name, named)


def _logs_of(history: Any) -> dict[str, Any]:
    logs = getattr(history, "history", history)
    if not isinstance(logs, dict) or not logs.get("acceptance_rate"):
        raise InvalidArgument(
            "`history` must be what `RSFTModel.fit` returned, of an epoch or more. "
            f"Received: {type(history).__name__}."
        )
    return logs


# Review -------------------------------------------------------------------------------


class Review(Sequence):
    """Samples to look at, and what was decided about them: rows of corrections.

    Shown in a notebook with buttons, where ipywidgets is installed.
    """

    def __init__(
        self,
        recorder: Any,
        images: Any,
        class_names: Sequence[str] | None,
        count: int,
    ):
        ledger = recorder.ledger
        self._page: str | os.PathLike | None = recorder.page
        self._names = names_of(ledger, class_names)
        rows = most_suspicious(ledger, count)
        self._pictures = jpegs(recorder, rows, images)
        named = [*self._names, ""]  # -1, not known, is the empty name.
        self._rows = {str(ledger.ids[row]): int(row) for row in rows}
        self._given = {
            one: named[ledger.labels[row]] for one, row in self._rows.items()
        }
        self._proposed = {
            one: named[ledger.predicted[row]] for one, row in self._rows.items()
        }
        self._shares = ledger.predicted_probability
        self._decided: dict[str, Correction] = {}

    def decide(self, sample_id: str, decision: str, new_label: str = "") -> None:
        """Notes a decision, as its button does.

        Args:
            sample_id: The id of a sample that is shown.
            decision: `"keep"`, `"relabel"`, `"drop"`, or `""` to take one back.
            new_label: Name of the right class, for `"relabel"` alone. Default there:
                the proposed one.

        Raises:
            InvalidArgument: If an argument is not as above.
        """
        given = self._given.get(sample_id)
        if decision == "relabel":
            new_label = new_label or self._proposed.get(sample_id, "")
        else:
            new_label = ""
        is_new = new_label in self._names and new_label != given
        if (
            given is None
            or decision not in ("", *DECISIONS)
            or (decision == "relabel" and not is_new)
        ):
            raise InvalidArgument(
                "Expected the id of a sample that is shown, keep, relabel or drop, and "
                f"for relabel another class than {given!r}. Received: {sample_id!r}, "
                f"{decision!r}, {new_label!r}."
            )
        self._decided.pop(sample_id, None)
        if decision:
            row = Correction(sample_id, given, decision, new_label)
            self._decided[sample_id] = row

    def __len__(self) -> int:
        return len(self._decided)

    def __getitem__(self, index: Any) -> Any:
        return list(self._decided.values())[index]

    def to_frame(self) -> Any:
        """Returns the decisions as a DataFrame of id, given_label, decision, new_label.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "A DataFrame needs pandas: pip install pandas. Without it, give the "
                "review itself as `corrections`."
            ) from error
        return pandas.DataFrame(list(self), columns=Correction._fields, dtype=str)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if importlib.util.find_spec("ipywidgets") is None:
            return {"text/plain": repr(self), "text/html": self._repr_html_()}
        return self.widget()._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        return f"<Review of {len(self._rows)} samples, {len(self)} decided>"

    def _repr_html_(self) -> str:
        cells = []
        for one, row in self._rows.items():
            content = base64.b64encode(self._pictures.get(row, b"")).decode()
            picture = f'<img alt="" src="data:image/jpeg;base64,{content}"/>'
            said = (one, self._given[one], self._said(one))
            escaped = "".join(f"<td>{html.escape(text)}</td>" for text in said)
            cells.append(f"<tr><td>{picture if content else ''}</td>{escaped}</tr>")
        head = "<tr><th></th><th>id</th><th>given</th><th>proposed</th></tr>"
        page = "<code>rsft.write_report(model, history, ledger)</code> writes a page"
        if self._page is not None:
            page = f'<a href="{html.escape(str(self._page))}">The report</a> is a page'
        return (
            f"<table><thead>{head}</thead><tbody>{''.join(cells)}</tbody></table>"
            f"<p>{page} to review them in, which saves corrections.csv. For buttons "
            f"here: <code>{html.escape(_NOTEBOOK)}</code>.</p>"
        )

    def _said(self, one: str) -> str:
        share = float(self._shares[self._rows[one]])
        known = self._proposed[one]
        return f"{known} ({100 * share:.0f} %)" if known else ""

    def widget(self) -> Any:
        """Returns the samples with their buttons, as an `ipywidgets.VBox`."""
        import ipywidgets

        boxes = []
        for one, row in self._rows.items():
            parts = [
                ipywidgets.HTML(
                    f"{html.escape(one)}<br>given <b>{html.escape(self._given[one])}"
                    f"</b>, proposed <b>{html.escape(self._said(one) or '-')}</b>"
                )
            ]
            verbs = ipywidgets.ToggleButtons(
                options=[("?", ""), *((verb, verb) for verb in DECISIONS)]
            )
            others = [name for name in self._names if name != self._given[one]]
            proposed = self._proposed[one]
            label = ipywidgets.Dropdown(
                options=others, value=proposed if proposed in others else others[0]
            )
            if one in self._decided:  # Shown once more.
                verbs.value = self._decided[one].decision
                label.value = self._decided[one].new_label or label.value

            def decided(
                change: Any, one: str = one, verbs: Any = verbs, label: Any = label
            ) -> None:
                self.decide(one, verbs.value, label.value)

            for button in (verbs, label):
                button.observe(decided, "value")
            if row in self._pictures:
                picture = ipywidgets.Image(
                    value=self._pictures[row], format="jpeg", width=_SMALL_SIDE
                )
                parts.insert(0, picture)
            boxes.append(ipywidgets.HBox([*parts, verbs, label]))
        return ipywidgets.VBox(boxes)
