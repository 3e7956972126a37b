from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from torch import nn

from modafill import ModalityImputer
from modafill.models.admc import ADMC, ADMCConfig
from modafill.models.completed import ModalitySpec
from modafill.sklearn import ModalityTransformer

WIDTHS = {"text": 5, "audio": 4, "vision": 3}


@pytest.fixture(scope="module")
def imputer() -> ModalityImputer:
    torch.manual_seed(0)
    config = ADMCConfig(width=8, mlp_hidden=8, adn_layers=1, adn_heads=2, adn_feedforward=16, sampling_steps=3,
                        conditioning="clean", fusion_feedforward=16, classifier_hidden=8)  # fmt: skip
    model = ADMC({name: ModalitySpec(width, False) for name, width in WIDTHS.items()}, 2, config)
    for unimodal in model.unimodal.values():
        nn.init.normal_(unimodal.encoder.mean)
    return ModalityImputer(model)


def rows(count: int = 30) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(count, 12))
    x[::3, :5] = np.nan
    x[1::4, 5:9] = np.nan
    return x


def test_it_is_the_imputer_on_blocks_of_columns(imputer: ModalityImputer) -> None:
    x, transformer = rows(), ModalityTransformer(WIDTHS, imputer, n_samples=2, random_state=7)
    out = transformer.fit_transform(x)
    blocks = {"text": x[:, :5], "audio": x[:, 5:9], "vision": x[:, 9:]}
    features = {name: torch.tensor(block, dtype=torch.float32) for name, block in blocks.items()}
    available = torch.stack([~block.isnan().any(1) for block in features.values()], 1)
    expected = imputer(features, available, n_samples=2, seed=7)
    assert (out.shape, out.dtype) == ((30, 24), np.float32)
    np.testing.assert_array_equal(out, torch.cat(list(expected.embeddings.values()), 1).numpy())
    assert transformer.get_feature_names_out()[[0, 8, 23]].tolist() == ["text_0", "audio_0", "vision_7"]


def test_a_row_does_not_depend_on_how_many_there_are(imputer: ModalityImputer) -> None:
    x, transformer = rows(2100), ModalityTransformer(WIDTHS, imputer)
    x[1024] = x[0]  # the first of another part
    whole = transformer.fit(x).transform(x)
    assert (whole[0, :8] != whole[1024, :8]).all(), "two rows have the same noise"
    np.testing.assert_array_equal(whole[0, 16:], whole[1024, 16:])
    np.testing.assert_allclose(transformer.transform(x[:1500]), whole[:1500], rtol=0, atol=1e-5)


def test_it_is_a_step_like_any_other(imputer: ModalityImputer) -> None:
    x = rows(400)
    y = (np.nan_to_num(x[:, 9]) > 0).astype(int)
    pipeline = make_pipeline(ModalityTransformer(WIDTHS, imputer), LogisticRegression(max_iter=500))
    assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.6
    again = pickle.loads(pickle.dumps(pipeline.fit(x, y)))
    np.testing.assert_array_equal(again.predict_proba(x), pipeline.predict_proba(x))
    assert clone(pipeline).get_params()["modalitytransformer__widths"] == WIDTHS


def test_it_trains_on_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**ADMCConfig.PRESETS["small"], "encoder_epochs": 1, "adn_epochs": 1, "fusion_epochs": 1, "width": 8}
    monkeypatch.setitem(ADMCConfig.PRESETS, "small", small)
    x = rows(200)
    y = np.where(np.nan_to_num(x[:, 9]) > 0, "glad", "sad")
    with pytest.raises(ValueError, match="y: got None, expected classes"):
        ModalityTransformer(WIDTHS).fit(x)
    transformer = ModalityTransformer(WIDTHS).fit(x, y)
    assert transformer.imputer_.classes == ("glad", "sad")
    assert np.isfinite(transformer.transform(x)).all()


def test_mistakes(imputer: ModalityImputer) -> None:
    x = rows()
    transformer = ModalityTransformer(WIDTHS, imputer)
    for wrong, message in (
        (x[:, 1:], r"X: got shape \[30, 11\], expected \[N, 12\] with at least one row"),
        (x[:0], r"X: got shape \[0, 12\]"),
        (x[0], "Expected 2D array, got 1D array"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer.fit(wrong)
    partly = x.copy()
    partly[4, 6] = np.nan
    with pytest.raises(ValueError, match="X: audio is NaN in part in row 4, expected all of its columns or none"):
        transformer.fit(partly)
    empty = x.copy()
    empty[2] = np.nan
    with pytest.raises(ValueError, match="X: nothing is observed in row 2, expected at least one modality"):
        transformer.fit(empty)
    empty[2] = np.inf
    with pytest.raises(ValueError, match="X: text has infinity in row 2"):
        transformer.fit(x).transform(empty)
    turned = {name: WIDTHS[name] for name in ("vision", "text", "audio")}
    with pytest.raises(ValueError, match=r"widths: got .*, in the imputer's order"):
        ModalityTransformer(turned, imputer).fit(x)
    with pytest.raises(ValueError, match=r"widths: got .*'text': 6.*, expected .*'text': 5.* in the imputer's order"):
        ModalityTransformer({"text": 6, "audio": 3, "vision": 3}, imputer).fit(x)


def test_columns_in_another_order_are_refused(imputer: ModalityImputer) -> None:
    x = pd.DataFrame(rows(), columns=[f"c{i}" for i in range(12)])
    transformer = ModalityTransformer(WIDTHS, imputer).fit(x)
    assert transformer.feature_names_in_.tolist() == list(x.columns)
    assert transformer.n_features_in_ == 12
    np.testing.assert_array_equal(transformer.transform(x), transformer.transform(x))
    with pytest.raises(ValueError, match="feature names should match"):
        transformer.transform(x[x.columns[::-1]])
