"""Alerts at a local webhook: every event, servers that hang or refuse, secrets, training."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_llmjp import cli
from megatron_llmjp.alerts import delivery
from megatron_llmjp.alerts.delivery import Alert, deliver
from megatron_llmjp.alerts.destinations import (
    COMMAND_VARIABLE,
    WEBHOOK_VARIABLE,
    Destinations,
    destinations_of_arguments,
    find_destinations,
)
from megatron_llmjp.alerts.run_end import JOB_VARIABLE, end_event
from megatron_llmjp.alerts.sender import MAX_PENDING, AlertSender
from megatron_llmjp.checkpoint.run_lock import IN_USE
from megatron_llmjp.config.flags import Command, parse
from megatron_llmjp.config.loading import dump_config
from megatron_llmjp.config.validation import check_config
from megatron_llmjp.errors import UserError
from megatron_llmjp.parallel.launcher import free_port
from megatron_llmjp.parallel.ranks import LOCAL_LAUNCHER, Ranks
from megatron_llmjp.report.jobs import HANG_REPORT
from megatron_llmjp.report.status import read_status, status_json
from slurm import alert as job_alert
from tests.alerts.webhook import SECRET, Webhook
from tests.support.datasets import write_folds
from tests.support.processes import pretrain
from tests.support.timeouts import PROCESS_TIMEOUT
from tests.support.training import arguments

MODEL = ("--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1")
NO_PAUSES = (0.0, 0.0)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with Webhook() as running:
        yield running


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """Return the save folder of a run with one step."""
    folder = tmp_path / "run"
    folder.mkdir()
    record(folder, **{"lm loss": 2.5, "seconds remaining": 9.0, "seconds per iteration": 1.0})
    return folder


def record(save: Path, **values: Any) -> None:
    with (save / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"iteration": 10, **values}) + "\n")


def config(*flags: object) -> Any:
    return parse([*MODEL, *map(str, flags)]).config


def without_ages(status: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in status.items() if key != "seconds_since_log"}


def test_an_alert_is_the_status_of_run_status(webhook, save):
    alert = Alert("spike", "gradient norm 9", str(save))
    assert deliver(alert, Destinations(webhook.url))
    (found,) = webhook.received
    assert without_ages(found.pop("status")) == without_ages(status_json(read_status(save)))
    assert found.pop("time")
    text = "run: spike: gradient norm 9"
    assert found == {"event": "spike", "message": "gradient norm 9", "text": text}


def test_an_alert_without_a_save_folder(webhook, tmp_path):
    for folder in (None, str(tmp_path / "none")):
        assert deliver(Alert("end", "done", folder), Destinations(webhook.url))
    assert [alert["text"] for alert in webhook.received] == ["run: end: done", "none: end: done"]


def test_a_command(save, tmp_path, capfd):
    command = f'cat > "{tmp_path}/got" && echo "$ALERT_EVENT $ALERT_MESSAGE" >> {tmp_path}/env'
    assert deliver(Alert("crash", "日本 'x'", str(save)), Destinations(command=command))
    assert json.loads((tmp_path / "got").read_text())["status"]["iteration"] == 10
    assert (tmp_path / "env").read_text() == "crash 日本 'x'\n"
    assert not deliver(Alert("crash", "x", None), Destinations(command="exit 7"))
    assert "alert 'crash' was dropped: --alert-command: exit code 7" in capfd.readouterr().err


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    said: list[str] = []
    command = f"sleep 1000 & echo $! > {tmp_path}/child; wait"
    for seconds in (0.2, 2.0, 20.0):  # on a busy machine it takes longer to start the child
        monkeypatch.setattr(delivery, "ATTEMPT_SECONDS", seconds)
        alert = Alert("end", "x", None)
        assert not deliver(alert, Destinations(command=command), report=said.append)
        assert f"killed after {seconds:g} s" in said[-1]
        if child := (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip():
            break
    wait_until_ended(Path(f"/proc/{child}/stat"))


def wait_until_ended(stat: Path) -> None:
    """Wait for the end of a process whose parent may not have noticed it."""
    end = time.monotonic() + PROCESS_TIMEOUT
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end, stat.read_text()
            time.sleep(0.02)


def test_a_server_that_refuses(webhook, capfd):
    webhook.status = 503
    assert not deliver(Alert("end", "x", None), Destinations(webhook.url), pauses=NO_PAUSES)
    assert len(webhook.received) == len(NO_PAUSES)
    closed = f"http://127.0.0.1:{free_port()}/{SECRET}"
    for url in (closed, f"https://[{SECRET}", f"file:///{SECRET}", f"http://h:{SECRET}"):
        assert not deliver(Alert("end", "x", None), Destinations(url), pauses=NO_PAUSES)
    said = capfd.readouterr().err
    assert "webhook on 127.0.0.1: HTTP status 503" in said and "Connection refused" in said
    assert said.count("alert 'end' was dropped") == 5 and SECRET not in said


def test_a_server_that_hangs(webhook):
    """The delivery is given up before the server answers."""
    released = threading.Event()
    webhook.before_answer = lambda: released.wait(PROCESS_TIMEOUT)
    said: list[str] = []
    alert = Alert("end", "x", None)
    assert not deliver(alert, Destinations(webhook.url), limit=0.3, report=said.append)
    assert said == ["alert 'end' was dropped: not delivered within 0.3 s"]
    assert webhook.answered == 0
    released.set()


def test_a_sender_never_waits(webhook, capfd):
    """All alerts are accepted or dropped before the server has answered the first."""
    released = threading.Event()
    webhook.before_answer = lambda: released.wait(PROCESS_TIMEOUT)
    sender = AlertSender(Destinations(webhook.url))
    sender.send(Alert("spike", "first", None))
    assert webhook.wait(lambda: len(webhook.received) == 1, PROCESS_TIMEOUT)
    for number in range(MAX_PENDING + 5):
        sender.send(Alert("spike", str(number), None))
    sender.close()
    assert webhook.answered == 0
    assert capfd.readouterr().err.count("earlier ones are not delivered yet") == 1
    released.set()
    assert webhook.wait(lambda: webhook.answered == 1 + MAX_PENDING, PROCESS_TIMEOUT)
    sender._thread.join(PROCESS_TIMEOUT)
    assert not sender._thread.is_alive()
    assert [alert["message"] for alert in webhook.received[1:]] == [
        str(number) for number in range(MAX_PENDING)
    ]


def test_a_sender_gives_up_after_its_end(monkeypatch):
    """A process that has ended its training sends no more alerts than fit into ten seconds."""
    sent: list[str] = []
    clock = iter([0.0, 5.0, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    sender = AlertSender(Destinations("x"), lambda alert, _: sent.append(alert.message))
    for number in range(3):
        sender._pending.put_nowait(Alert("spike", str(number), None))
    sender.close()
    sender._run()
    assert sent == ["0"]


def test_training_is_not_delayed(webhook, tmp_path):
    """The webhook answers the first spike only after the run has trained its last iteration."""
    folds, save = write_folds(tmp_path, (15, 15), repeat=True), tmp_path / "save"
    metrics = save / "metrics.jsonl"
    order: list[str] = []

    def wait_for_the_end() -> None:
        end = time.monotonic() + PROCESS_TIMEOUT
        while '"outcome": "done"' not in metrics.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        order.append("done" if '"outcome": "done"' in metrics.read_text() else "delayed")

    webhook.before_answer = wait_for_the_end
    flags = ["--spike-threshold", 1.001, "--alert-webhook", webhook.url, "--save", save]
    done = pretrain(*arguments("laptop-gpt2", folds, *flags))
    assert done.returncode == 0, done.stderr
    # On a slow machine the server takes longer than an attempt, which is repeated.
    assert set(webhook.events) == {"spike", "end"} and set(order) == {"done"}
    spike, end = webhook.received[0], webhook.received[-1]
    assert (spike["event"], end["event"]) == ("spike", "end")
    assert "spike" in spike["message"] and "Documents: " in spike["message"]
    assert spike["status"]["state"] == "running" and 20 <= spike["status"]["iteration"] <= 30
    assert (end["status"]["state"], end["message"]) == ("finished", "all iterations are done")
    texts = [done.stdout, done.stderr]
    texts += [p.read_text(errors="replace") for p in save.rglob("*") if p.is_file()]
    assert not any(SECRET in text for text in texts)


def test_what_a_single_process_sends_when_it_fails(webhook, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_exit_now", lambda code: code)
    run = type("Run", (), {"config": config("--alert-webhook", webhook.url)})
    for launcher, rank in (("hand", 0), (LOCAL_LAUNCHER, 0), ("torchrun", 1), ("srun", 0)):
        ranks = Ranks(rank, 2, rank, "", "", launcher)
        if launcher == "srun":
            monkeypatch.setenv(JOB_VARIABLE, "1")
        cli._alert_end(run, ranks, 1, ValueError("closed by peer"))
    assert [alert["text"] for alert in webhook.received] == [
        "run: crash: ValueError: closed by peer"
    ]


@pytest.mark.parametrize(
    ("code", "hangs", "event"),
    [(0, False, "stop"), (3, False, "stop"), (137, False, "crash"), (1, True, "hang")],
)
def test_the_local_launcher(code, hangs, event, webhook, save, monkeypatch):
    """It reports what its ranks cannot, such as a kill -9 of one of them."""
    report = save / HANG_REPORT
    report.parent.mkdir()
    report.write_text("error: an earlier hang\n")

    def launch(command, processes):
        if hangs:
            report.unlink()
            time.sleep(0.01)
            report.write_text("error: no progress for 8 minutes at iteration 10\nrank 3\n")
        return code

    monkeypatch.setattr(cli, "launch", launch)
    monkeypatch.setattr(cli, "resolve_run", lambda *_: None)
    monkeypatch.setattr(cli, "check_start", lambda _: [])
    flags = ["--save", save, "--alert-webhook", webhook.url]
    command = Command(config(*flags), cli.Mode.TRAIN, 2, None, None, (), {})
    assert cli._start_ranks(command, []) == code
    assert webhook.events == [event]


@pytest.mark.parametrize(
    ("code", "record", "events"),
    [
        (0, {"why": "the run is finished"}, ["end"]),
        (3, {"why": "stopped on request; requeued", "requeued": True}, ["stop"]),
        (137, {"why": "failed; requeued", "requeued": True, "cause": "rank 3: no room"}, ["crash"]),
        (1, {"why": "failed", "cause": "no progress for 8 minutes at iteration 9"}, ["hang"]),
        (1, {"why": "failed", "excluded": [{"node": "n3", "reason": "slow"}]},
         ["exclusion", "crash"]),
        (1, None, ["crash"]),
    ],
)  # fmt: skip
def test_a_job(code, record, events, webhook, save, monkeypatch):
    """The job script reports the end after ``requeue.py`` has recorded it."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    if code == 0:
        with (save / "metrics.jsonl").open("a") as stream:
            stream.write('{"iteration": 10, "event": "end", "outcome": "done"}\n')
    (save / "logs" / "job7_2").mkdir(parents=True)
    ends = [{"job": "7", "restart": 1, "why": "an earlier end", "cause": "an earlier error"}]
    if record is not None:
        ends.append({"job": "7", "restart": 2, "exit code": code, **record})
    (save / "requeues.jsonl").write_text("".join(json.dumps(end) + "\n" for end in ends))
    flags = [*MODEL, "--alert-webhook", webhook.url, "--save", str(save)]
    assert job_alert.main(["--save", str(save), "--code", str(code), "--", *flags]) == 0
    assert webhook.events == events
    message = webhook.received[-1]["message"]
    assert message.startswith(f"exit code {code}") and "earlier" not in message
    for value in (record or {}).get("why", ""), (record or {}).get("cause", ""):
        assert value in message or code == 0
    assert code != 0 or message == "exit code 0: all iterations are done"
    if "exclusion" in events:
        assert webhook.received[0]["message"] == "excluded n3: slow"


def test_a_job_that_goes_on_without_a_node(webhook, save, monkeypatch):
    """After a failed preflight, nodes are excluded within the job, whose end is not recorded."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (save / "requeues.jsonl").write_text(json.dumps({"job": "7", "restart": 0, "why": "x"}) + "\n")
    log = save / "exclusions.jsonl"
    for node, age in (("n1", 90), ("n2", 9)):
        entry = {"node": node, "reason": "slow", "job": "7", "time": time.time() - age}
        with log.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
    started, flags = str(time.time() - 60), [*MODEL, "--alert-webhook", webhook.url]
    words = ["--save", str(save), "--started", started, "--code", "1", "--preflight", "--", *flags]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job_alert.main(words) == 0
    assert [alert["text"] for alert in webhook.received] == ["run: exclusion: excluded n2: slow"]
    # An exclusion that is newer than the record of the end, by the clock of a file server.
    with (save / "requeues.jsonl").open("a") as stream:
        stream.write(json.dumps({"job": "7", "restart": 1, "why": "failed"}) + "\n")
    os.utime(save / "requeues.jsonl", (1e9, 1e9))
    assert job_alert.main(words) == 0
    assert webhook.events == ["exclusion", "crash"]


def test_a_job_whose_script_was_ended(webhook, save, monkeypatch):
    """The next start reports the end of a start that Slurm ended with its script, once known."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    flags = [*MODEL, "--alert-webhook", webhook.url]
    words = ["--save", str(save), "--previous-start", "--", *flags]
    log = save / "requeues.jsonl"
    restarted = {"job": "7", "restart": 1, "in this job": True}
    log.write_text("".join(json.dumps(end) + "\n" for end in (
        {"job": "7", "restart": 0}, {"job": "6", "restart": 1}, restarted)))  # fmt: skip
    assert job_alert.main(words) == 0
    record(save, event="end", outcome="stopped", why="signal received")
    assert job_alert.main(words) == 0
    assert webhook.events == ["crash", "stop"]
    messages = [alert["message"] for alert in webhook.received]
    assert "first node was lost" in messages[0] and messages[1].endswith("7: signal received")
    with log.open("a") as stream:
        stream.write(json.dumps({"job": "7", "restart": 1}) + "\n")
    assert job_alert.main(words) == 0
    assert len(webhook.received) == 2


def test_a_job_that_a_running_one_rejected(webhook, save, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    end = {"job": "8", "restart": 0, "exit code": 2, "why": "x", "cause": f"--save X {IN_USE} (y)"}
    (save / "requeues.jsonl").write_text(json.dumps(end) + "\n")
    flags = [*MODEL, "--alert-webhook", webhook.url]
    assert job_alert.main(["--save", str(save), "--code", "2", "--", *flags]) == 0
    assert webhook.received == []


def test_a_job_without_alerts_sends_none(webhook, save):
    assert job_alert.main(["--save", str(save), "--code", "1", "--", *MODEL]) == 0
    assert webhook.received == []


def test_a_hang(webhook, save):
    """Without a launcher that waits for the ranks, the watchdog sends the alert."""
    from torch.distributed import HashStore

    from megatron_llmjp.training.watchdog import hang_detection

    flags = ["--save", save, "--alert-webhook", webhook.url, "--hang-timeout-minutes", 0]
    for launcher in ("torchrun", LOCAL_LAUNCHER):
        ranks = Ranks(0, 4, 0, "", "", launcher)
        with hang_detection(config(*flags), ranks, HashStore()) as watchdog:
            watchdog._print_report(["rank 3 on n1: no response"])
    (found,) = webhook.received
    assert found["event"] == "hang"
    assert found["message"].endswith("at iteration 0; rank 3 on n1: no response")
    assert found["message"].startswith("no progress for ")


def test_events_of_ends():
    assert end_event(0, "finished", "") == "end" and end_event(0, "stopped", "") == "stop"
    assert end_event(130, "", "") == "stop" and end_event(2, "", "") == "crash"
    assert end_event(1, "", "no progress for 8 minutes") == "hang" == end_event(1, "", "", True)


def test_where_destinations_come_from(monkeypatch):
    env = {WEBHOOK_VARIABLE: "https://env", COMMAND_VARIABLE: "true"}
    assert find_destinations(config().logging, env) == Destinations("https://env", "true")
    given = config("--alert-webhook", "https://flag").logging
    assert find_destinations(given, env) == Destinations("https://flag", "true")
    assert not find_destinations(config().logging, {})
    invalid = [*MODEL, "--unknown", "--alert_webhook=https://flag"]
    assert destinations_of_arguments(invalid, {}) == Destinations("https://flag")
    assert destinations_of_arguments([*invalid, "--alert-command"], env).webhook == "https://env"


def test_secrets_are_not_part_of_a_configuration(tmp_path):
    """A checkpoint's config.yaml, the W&B configuration and TensorBoard's text have none."""
    found = config("--alert-webhook", f"https://{SECRET}", "--alert-command", SECRET)
    texts = [dump_config(found), json.dumps(found.model_dump(mode="json")), repr(found)]
    texts.append(repr(find_destinations(found.logging, {})))
    assert not any(SECRET in text for text in texts)
    with pytest.raises(UserError, match="alert_webhook must be a URL") as error:
        check_config(config("--alert-webhook", SECRET), 1)
    assert SECRET not in str(error.value)


def test_a_command_in_a_file_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("logging:\n  alert_webhook: https://host/x\n  alert_command: touch proof\n")
    with pytest.raises(UserError, match="line 3: alert_command is executed: pass it as --alert-co"):
        parse([*MODEL, "--config", str(file)])
    file.write_text("logging:\n  alert_webhook: https://host/x\n")
    logging = parse([*MODEL, "--config", str(file)]).config.logging
    assert find_destinations(logging, {}).webhook == "https://host/x"
