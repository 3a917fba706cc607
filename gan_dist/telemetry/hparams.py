"""TensorBoard's HPARAMS page of a sweep: one experiment, a session for each trial, and where their metrics are.

The figures themselves are those that each run writes: a session is a run's directory, its metrics lie in tensorboard/.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.event_file_writer import EventFileWriter

METRICS = ("evaluate/swd", "evaluate/fid")


def write_experiment(folder: Path, ranges: Mapping[str, tuple[float, float] | Sequence[Any]]) -> None:
    """Writes what is searched to the directory of a sweep, once: {key: (low, high), or a list of choices}."""
    if any(folder.glob("events.out.tfevents.*")):
        return
    experiment = api_pb2.Experiment(time_created_secs=time.time())
    for key, domain in ranges.items():
        info = experiment.hparam_infos.add(name=key)
        if isinstance(domain, tuple):
            info.type = api_pb2.DATA_TYPE_FLOAT64
            info.domain_interval.min_value, info.domain_interval.max_value = domain
        elif all(isinstance(value, bool) for value in domain):
            info.type = api_pb2.DATA_TYPE_BOOL
            info.domain_discrete.extend(domain)
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in domain):
            info.type = api_pb2.DATA_TYPE_FLOAT64
            info.domain_discrete.extend(domain)
        else:
            info.type = api_pb2.DATA_TYPE_STRING
            info.domain_discrete.extend(map(_text, domain))
    for tag in METRICS:
        name = api_pb2.MetricName(group="tensorboard", tag=tag)
        experiment.metric_infos.add(name=name, display_name=tag)
    _write(folder, metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))


def begin_session(run: Path, settings: Mapping[str, Any], texts: Sequence[str] = ()) -> None:
    """Writes a trial's settings to its run directory, once; those of the keys in `texts` as texts."""
    if any(run.glob("events.out.tfevents.*")):
        return
    start = SessionStartInfo(group_name=run.name, start_time_secs=time.time())
    for key, value in settings.items():
        if key in texts or not isinstance(value, bool | int | float):
            start.hparams[key].string_value = _text(value)
        elif isinstance(value, bool):
            start.hparams[key].bool_value = value
        else:
            start.hparams[key].number_value = value
    _write(run, metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))


def end_session(run: Path, success: bool) -> None:
    """Writes that a trial has ended."""
    status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
    end = SessionEndInfo(status=status, end_time_secs=time.time())
    _write(run, metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _write(folder: Path, tag: str, data: HParamsPluginData) -> None:
    kept = metadata.create_summary_metadata(data)
    value = Summary.Value(tag=tag, metadata=kept, tensor=metadata.NULL_TENSOR)
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(wall_time=time.time(), summary=Summary(value=[value])))
    writer.close()
