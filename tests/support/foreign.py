"""Small files in the layouts that others publish, written with their own libraries."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SIZES = {"train": 24, "valid": 9, "test": 9}
WIDTHS = {"text": 8, "audio": 5, "vision": 6}


def frames(random: np.random.Generator, count: int, width: int, signal: float) -> np.ndarray:
    """``[count, width]`` without zeros, whose mean tells ``signal``."""
    return (random.normal(signal, 1, (count, width)) + 0.001).astype(np.float32)


def split_arrays(random: np.random.Generator, lengths: dict[str, int], n: int, front: bool) -> tuple[Any, Any, Any]:
    """Padded arrays, true lengths and scores of one split."""
    scores = random.uniform(-3, 3, n).astype(np.float32)
    arrays, true = {}, {}
    for name, longest in lengths.items():
        arrays[name] = np.zeros((n, longest, WIDTHS[name]), dtype=np.float32)
        true[name] = random.integers(1, longest + 1, n)
        for row, length in enumerate(true[name]):
            place = slice(longest - length, None) if front else slice(length)
            arrays[name][row, place] = frames(random, length, WIDTHS[name], scores[row])
    return arrays, true, scores


def mmsa(*, aligned: bool = False, sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, Any]:
    """What an MMSA pickle holds."""
    random = np.random.default_rng(seed)
    lengths = dict.fromkeys(WIDTHS, 7) if aligned else {"text": 7, "audio": 12, "vision": 10}
    value: dict[str, Any] = {}
    for split, n in sizes.items():
        arrays, true, scores = split_arrays(random, lengths, n, front=False)
        if aligned:
            for name in ("audio", "vision"):
                arrays[name], true[name] = np.zeros_like(arrays[name]), true["text"]
                for row, length in enumerate(true["text"]):
                    arrays[name][row, :length] = frames(random, length, WIDTHS[name], scores[row])
        bert = np.zeros((n, 3, lengths["text"]), dtype=np.float32)
        bert[:, 1] = np.arange(lengths["text"]) < true["text"][:, None]
        value[split] = {
            **arrays,
            "raw_text": np.array([f"sentence {i}" for i in range(n)], dtype=object),
            "text_bert": bert,
            "id": [f"{split}{i // 3}$_${i % 3}" for i in range(n)],
            "annotations": ["Positive" if s > 0 else "Negative" for s in scores],
            "regression_labels": scores,
            "classification_labels": (scores > 0).astype(np.float32) * 2,
        }
        if not aligned:
            value[split].update(audio_lengths=true["audio"].tolist(), vision_lengths=true["vision"].tolist())
    return value


def mult(*, emotions: bool = False, sizes: dict[str, int] = SIZES, seed: int = 0) -> dict[str, Any]:
    """What a MulT pickle holds: padded in front, ids as rows of bytes, labels ``[N, 1, 1]`` or pairs ``[N, 4, 2]``."""
    random = np.random.default_rng(seed)
    value: dict[str, Any] = {}
    for split, n in sizes.items():
        arrays, _, scores = split_arrays(random, {"text": 7, "audio": 12, "vision": 10}, n, front=True)
        value[split] = {**arrays, "labels": scores.reshape(n, 1, 1)}
        if emotions:
            value[split]["labels"] = np.eye(2)[np.eye(4, dtype=int)[np.arange(n) % 4]]
        value[split]["id"] = np.array([[f"{split}{i // 3}".encode(), b"0.5", f"{i}".encode()] for i in range(n)])
    return value


def write_mmin(root: Path, *, folds: int = 3, n: int = 36, one_hot: bool = True, seed: int = 0) -> dict[str, Any]:
    """MMIN's folder; answers utterance → modality → frames."""
    random = np.random.default_rng(seed)
    keys = [f"Ses0{1 + i % 3}F_impro0{1 + i % 2}_F{i:03d}" for i in range(n)]
    label = {key: i % 4 for i, key in enumerate(keys)}
    truth: dict[str, dict[str, np.ndarray]] = {key: {} for key in keys}
    for folder, name, file in (("L", "text", "bert_large"), ("A", "audio", "comparE"), ("V", "vision", "denseface")):
        (root / "features" / folder).mkdir(parents=True)
        with h5py.File(root / "features" / folder / f"{file}.h5", "w") as h5:
            for key in keys:
                truth[key][name] = frames(random, int(random.integers(1, 9)), WIDTHS[name], label[key])
                h5[key] = truth[key][name]
    with h5py.File(root / "features" / "A" / "comparE_mean_std.h5", "w") as h5:
        for fold in range(1, folds + 1):
            h5[f"{fold}/mean"], h5[f"{fold}/std"] = np.zeros(WIDTHS["audio"]), np.ones(WIDTHS["audio"])
    for fold in range(1, folds + 1):
        at = root / "target" / str(fold)
        at.mkdir(parents=True)
        part = (np.arange(n) // 4 + fold) % 3
        for number, name in enumerate(("trn", "val", "tst")):
            chosen = [key for key, p in zip(keys, part, strict=True) if p == number]
            values = np.array([label[key] for key in chosen])
            np.save(at / f"{name}_label.npy", np.eye(4)[values] if one_hot else values)
            names = [[key.encode(), b"."] for key in chosen] if one_hot else chosen
            np.save(at / f"{name}_int2name.npy", np.array(names))
    return truth


def write_mintrec(root: Path, *, text: bool = False, seed: int = 0) -> dict[str, Any]:
    """MIntRec's folder."""
    random = np.random.default_rng(seed)
    intents = ["Complain", "Greet", "Care", "Comfort"]
    # As tables are written: a text that begins with a quote is in quotes as a whole.
    texts = ("he said {}", 'he said "{}', '"""{}"", he said"')
    audio, video, words, truth = {}, {}, {}, {}
    for part, n in (("train", 24), ("dev", 12), ("test", 12)):
        lines = ["season\tepisode\tclip\ttext\tlabel"]
        for i in range(n):
            key, intent = f"S04_E{part}_{i}", intents[i % 4]
            lines.append("\t".join([*key.split("_"), texts[i % 3].format(i), intent]))
            audio[key] = frames(random, int(random.integers(1, 9)), WIDTHS["audio"], i % 4)
            video[key] = [frames(random, 1, WIDTHS["vision"], i % 4) for _ in range(int(random.integers(1, 9)))]
            words[key] = frames(random, int(random.integers(1, 9)), WIDTHS["text"], i % 4)
            truth[key] = {
                "audio": audio[key],
                "vision": np.concatenate(video[key]),
                "text": words[key],
                "intent": intent,
            }
        root.mkdir(exist_ok=True)
        (root / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    for name, value in (
        ("audio_data/audio_feats", audio),
        ("video_data/video_feats", video),
        ("text_data/text_feats", words),
    ):
        if text or not name.startswith("text"):
            (root / name).parent.mkdir(parents=True)
            (root / f"{name}.pkl").write_bytes(pickle.dumps(value))
    return truth


def write_csd(root: Path, *, aligned: bool = False, videos: int = 8, seed: int = 0) -> dict[str, Any]:
    """Computational sequences of four segments a video, 0.5 s apart; frames of 0.1 and 0.25 s."""
    random = np.random.default_rng(seed)
    sequences: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    truth: dict[str, dict[str, Any]] = {}
    files = {
        "text": ("glove_vectors", "CMU_MOSI_TimestampedWordVectors.csd", 0.25),
        "audio": ("COVAREP", "CMU_MOSI_COVAREP.csd", 0.1),
        "vision": ("FACET_4.2", "CMU_MOSI_Visual_Facet_42.csd", 0.1),
    }
    labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for v in range(videos):
        video, scores = f"vid{v}", random.uniform(-3, 3, 4).astype(np.float32)
        starts = np.arange(4) * 0.5
        labels[video] = (scores[:, None], np.stack([starts, starts + 0.5], 1))
        for name, (root_name, _, step) in files.items():
            count = round(2.0 / step)
            at = np.arange(count) * step
            values = frames(random, count, WIDTHS[name], 0)
            sequences.setdefault(root_name, {})[video] = (values, np.stack([at, at + step], 1))
            for k in range(4):
                inside = (at + step / 2 >= starts[k]) & (at + step / 2 < starts[k] + 0.5)
                truth.setdefault(f"{video}[{k}]", {"sentiment": scores[k]})[name] = values[inside]
    if aligned:
        for name, (root_name, _, _) in files.items():
            sequences[root_name] = {key: (row[name], np.zeros((len(row[name]), 2))) for key, row in truth.items()}
        labels = {key: (np.array([[row["sentiment"]]]), np.zeros((1, 2))) for key, row in truth.items()}
    root.mkdir()
    everything = {**{root_name: (file, sequences[root_name]) for root_name, file, _ in files.values()}}
    for root_name, (file, entries) in {
        **everything,
        "Opinion Segment Labels": ("CMU_MOSI_Opinion_Labels.csd", labels),
    }.items():
        with h5py.File(root / file, "w") as h5:
            for key, (values, intervals) in entries.items():
                for what, array in (("features", values), ("intervals", intervals)):
                    h5.create_dataset(
                        f"{root_name}/data/{key}/{what}", data=array, compression="gzip", compression_opts=9
                    )
            name = h5.create_dataset(f"{root_name}/metadata/root name", (1,), dtype=h5py.string_dtype())
            name[0] = json.dumps(root_name)
    with h5py.File(root / "CMU_MOSI_TimestampedWords.csd", "w") as h5:
        h5["words/data/vid0/features"], h5["words/data/vid0/intervals"] = np.array([[b"hello"]]), np.zeros((1, 2))
    return truth


def write_gcnet(root: Path, *, sessions: bool = False, seed: int = 0) -> dict[str, Any]:
    """GCNet's folder: MOSI-like (scores, three parts) or IEMOCAP-like (classes, sessions, two parts)."""
    random = np.random.default_rng(seed)
    names = {"text": "deberta-large-4-UTT", "audio": "wav2vec-large-c-UTT", "vision": "manet_UTT"}
    videos = [f"Ses0{1 + v % 5}F_impro{v:02d}" if sessions else f"vid{v}" for v in range(15)]
    ids: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    truth: dict[str, Any] = {}
    for v, video in enumerate(videos):
        ids[video] = [f"{video}_{i:03d}" for i in range(4)]
        values = [(v + i) % 4 for i in range(4)] if sessions else random.uniform(-3, 3, 4).tolist()
        labels[video] = np.array(values) if sessions else values
        for key, label in zip(ids[video], values, strict=True):
            truth[key] = {name: frames(random, 1, WIDTHS[name], label)[0] for name in names} | {"label": label}
    for name, folder in names.items():
        (root / "features" / folder).mkdir(parents=True)
        for number, (key, row) in enumerate(truth.items()):
            at = root / "features" / folder
            if name == "vision" and number % 2:
                (at / key).mkdir()
                for i in range(3):
                    np.save(at / key / f"{i}.npy", row[name] + np.float32(i - 1))
            else:
                np.save(at / f"{key}.npy", row[name])
    parts = [set(videos[:9]), set(videos[9:12]), set(videos[12:])]
    if sessions:
        parts = [parts[0] | parts[1], parts[2]]
    value = (ids, labels, {v: [""] * 4 for v in videos}, {v: ["words"] * 4 for v in videos}, *parts)
    (root / ("IEMOCAP_features_raw_4way.pkl" if sessions else "CMUMOSI_features_raw_2way.pkl")).write_bytes(
        pickle.dumps(value, protocol=2)
    )
    return truth


def python2_pickle(value: Any, protocol: int) -> bytes:
    """A pickle as Python 2.7 with numpy 1 writes it: ``str`` as bytes, arrays by ``_reconstruct``."""
    return (b"\x80\x02" if protocol == 2 else b"") + _python2(value, protocol) + b"."


def _python2(value: Any, protocol: int) -> bytes:
    def emit(item: Any) -> bytes:
        return _python2(item, protocol)

    if value is None:
        return b"N"
    if isinstance(value, bool):
        return (b"\x89", b"\x88")[value] if protocol else (b"I00\n", b"I01\n")[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value) if protocol else b"I%d\n" % value
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value) if protocol else b"F" + repr(value).encode() + b"\n"
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        if not protocol:
            return b"S" + repr(value)[1:].encode() + b"\n"
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, dict):
        return b"(d" + b"".join(emit(k) + emit(v) + b"s" for k, v in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(emit(item) + b"a" for item in value)
    if isinstance(value, tuple):
        return b"(" + b"".join(emit(item) for item in value) + b"t"
    assert isinstance(value, np.ndarray)
    objects = value.dtype.hasobject
    kind = emit("O8" if objects else value.dtype.str[1:])
    order = emit("|" if value.dtype.str[0] == "|" else "<")
    dtype = b"cnumpy\ndtype\n(" + kind + emit(0) + emit(1) + b"tR(" + emit(3) + order + b"NNN"
    dtype += emit(value.dtype.itemsize) + emit(1) if value.dtype.kind == "S" else emit(-1) * 2
    dtype += emit(63 if objects else 0) + b"tb"
    data = emit(value.reshape(-1).tolist() if objects else value.tobytes())
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + emit((0,)) + emit("b") + b"tR"
    return head + b"(" + emit(1) + emit(value.shape) + dtype + emit(False) + data + b"tb"
