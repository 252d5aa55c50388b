"""Exported files of the methods with networks of their own predict what their detectors do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax import methods
from iumad_jax.errors import UserError
from iumad_jax.export import formats
from iumad_jax.inference.anomaly_map import make_rule, measure_scales
from iumad_jax.inference.detector import detect
from iumad_jax.methods.method import with_frozen
from iumad_jax.models.backbone import FeatureExtractor
from iumad_jax.runtime import workdir as workdirs
from iumad_jax.shapes import Batch
from tests import sentences
from tests.integration.trained import LEARNED, samples, stacked

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]


@pytest.fixture(scope="module")
def images(detector, reader):
    return detector.prepare(*stacked([samples(reader, name)[-1] for name in LEARNED]))


@pytest.fixture(scope="module")
def extractor(detector):
    config = workdirs.read(detector.workdir)
    return FeatureExtractor(config.backbone.name, config.backbone.grid, config.backbone.levels)


@pytest.fixture(scope="module")
def features(detector, extractor, images):
    extract = jax.jit(lambda x: extractor.apply(detector.state.backbone, x).reshape(len(x), -1, 192))
    return {m: np.asarray(extract(x)) for m, x in images.items()}


@pytest.fixture(scope="module")
def with_method(detector, extractor, images, features):
    """Return a function that gives the detector another method, of random weights, which judges RGB alone."""

    def make(name, change=lambda method: method, **keys):
        config = workdirs.read(detector.workdir)
        config.update({"method": name, "modality": "rgb"})
        config.simplenet.update(keys)
        method, rule = change(methods.build(name, config)), make_rule(config)
        batch = Batch(features, images, np.arange(len(LEARNED), dtype=np.int32))
        variables = with_frozen(name, method, jax.jit(method.init)(jax.random.key(0), batch))
        variables = method.observe(variables, batch, 0)
        rng, spread = np.random.default_rng(0), 0.5 if name == "destseg" else 0.1  # so that maps are not constant
        drawn = jax.tree.map(lambda p: p + spread * rng.standard_normal(p.shape, np.float32), variables["params"])
        variables = method.arrange(variables | {"params": drawn})
        scale = measure_scales(jax.jit(method.predict)(variables, batch))
        state = detector.state._replace(
            variables=variables, scales=jax.tree.map(lambda value: np.stack([value] * len(LEARNED)), scale)
        )
        function = jax.jit(lambda state, images, id_: detect(method, rule, extractor, state, images, id_))
        return dataclasses.replace(detector, function=function, state=state)

    return make


@pytest.mark.parametrize(
    ("method", "keys"),
    [("simplenet", {}), ("simplenet", {"aggregation": "release"}), ("destseg", {}), ("diad", {}), ("cdad", {})],
)
def test_a_file_of_a_method_predicts_what_its_detector_does(with_method, images, method, keys):
    detector = with_method(method, **keys)
    expected = detector.judge(images)
    assert expected.map.std() > 0.01 * expected.map.max()
    for format_, batch in (("onnx", None), ("stablehlo", len(LEARNED))):
        outputs = formats.load_function(formats.export(detector, format_, batch), format_)(*images.values())
        np.testing.assert_allclose(outputs.map, expected.map, atol=1e-4 * expected.map.max())
        np.testing.assert_allclose(outputs.score, expected.score, rtol=1e-4)
        assert [LEARNED[number] for number in outputs.object_id] == expected.object.tolist()


def test_what_onnx_cannot_express_is_told(with_method):
    """As by a method of one's own that sorts."""

    def sorting(method):
        def predict(variables, batch):
            errors = method.predict(variables, batch)
            return errors._replace(score=jnp.sort(batch.images["rgb"].mean((2, 3)))[:, -1])

        return dataclasses.replace(method, predict=predict)

    with pytest.raises(UserError, match=f"^{sentences.NO_ONNX_OF_RUN.format('the primitive sort is not translated')}$"):
        formats.export(with_method("feature_norm", sorting), "onnx", None)
