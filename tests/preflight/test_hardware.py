"""Parsers of nvidia-smi, sysfs and the kernel log, on outputs in the documented formats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_llmjp.preflight import nvidia_smi
from megatron_llmjp.preflight.infiniband import counter_problems, read_ports
from megatron_llmjp.preflight.kernel_log import parse_xids, xid_problems

STATUS = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-abcdefab-cdef-abdc-abcd-abababababab)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-abcdefab-cdef-abdc-abcd-abababababac)
         Link 0: 26.562 GB/s
         Link 1: <inactive>
"""

ERRORS = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-abcdefab-cdef-abdc-abcd-abababababab)
\t Link 0: Replay Errors: 0
\t Link 0: Recovery Errors: 1
\t Link 0: CRC Errors: 7

\t Link 1: Replay Errors: 2
\t Link 1: Recovery Errors: 0
\t Link 1: CRC Errors: 5
"""

DMESG = """\
[   10.735323] pci 0000:04:00.0: 252.048 Gb/s available PCIe bandwidth
[ 1000.000000] NVRM: Xid (PCI:0000:10:1c): 48, pid=1896, DBE (double bit error) detected
[90000.100000] NVRM: Xid (PCI:0000:10:1c): 31, pid=1896, name=python, Ch 0000000a, MMU Fault
[90000.500000] NVRM: Xid (PCI:0000:83:00): 79, GPU has fallen off the bus.
[93600.500000] NVRM: Xid (PCI:0000:83:00): 79, GPU has fallen off the bus.
"""


def row(**values: str) -> nvidia_smi.Row:
    return {"index": "3", "memory.used": "4", **values}


def test_query_drops_fields_that_the_driver_does_not_know():
    asked = []

    def run(command):
        asked.append(command[1])
        if "clocks_event" in command[1]:
            raise RuntimeError('Field "clocks_event_reasons.active" is not a valid field to query.')
        return "0, 10, [N/A], 81559, NVIDIA H100 80GB HBM3, 550.54.15, 16, 41, 1980, 120.3, 0x4\n"

    rows = nvidia_smi.query(run, "--query-gpu", nvidia_smi.GPU_FIELDS)
    assert len(asked) == 2 and asked[0].startswith("--query-gpu=index,memory.used")
    assert rows[0]["name"] == "NVIDIA H100 80GB HBM3" and rows[0]["power.draw"] == "120.3"
    assert rows[0]["ecc.errors.uncorrected.volatile.total"] is None
    assert nvidia_smi.gpu_problems(rows, 1) == [] == nvidia_smi.slowdown_problems(rows)


def test_a_failing_driver_is_an_error():
    def run(command):
        raise RuntimeError("NVIDIA-SMI has failed because it couldn't communicate with the driver")

    with pytest.raises(RuntimeError, match="couldn't communicate"):
        nvidia_smi.query(run, "--query-gpu", nvidia_smi.GPU_FIELDS)


def test_rows_of_an_older_driver_are_shorter():
    (found,) = nvidia_smi.parse_rows("0, 10, 0, 81559, H100\n\n", nvidia_smi.GPU_FIELDS)
    assert found["name"] == "H100" and found["temperature.gpu"] is None


def test_faults_of_gpus():
    errors = "ecc.errors.uncorrected.volatile.total"
    rows = [row(**{errors: "2"}), row(**{"memory.used": "70000"}), row(**{"memory.used": "?"})]
    assert nvidia_smi.gpu_problems(rows, 4) == [
        "3 of 4 GPUs",
        "GPU 3: 2 uncorrected ECC errors",
        "GPU 3: 70000 MiB are used by another process",
    ]


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ("0x0000000000000000", ""),
        ("0x0000000000000004", ""),  # the power cap is normal under load
        ("0x0000000000000048", "hardware slowdown, hardware thermal slowdown (88 C, 600 MHz, 9 W)"),
        ("Not Active", ""),
    ],
)
def test_reduced_clocks(bits, text):
    values = {"temperature.gpu": "88", "clocks.sm": "600", "power.draw": "9"}
    found = nvidia_smi.slowdown_problems([row(**values, **{"clocks_event_reasons.active": bits})])
    assert found == ([f"GPU 3: {text}"] if text else [])


@pytest.mark.parametrize("yes", ["Yes", "1"])
def test_remapped_rows(yes):
    output = f"00000000:10:1C.0, {yes}, No\n00000000:83:00.0, 0, {yes}\n00000000:84:00.0, No, 0\n"
    rows = nvidia_smi.parse_rows(output, nvidia_smi.REMAPPED_FIELDS)
    pending, failed = nvidia_smi.remapping_problems(rows)
    assert pending == "GPU 00000000:10:1C.0: a bad memory row waits for a reset of the GPU"
    assert failed.startswith("GPU 00000000:83:00.0: remapping of a bad memory row failed")


def test_nvlinks():
    found = nvidia_smi.parse_nvlinks(STATUS, ERRORS)
    assert [found[0].active, found[1].active] == [2, 1] and found[1].inactive == [1]
    assert found[0].errors == {"Replay": 2, "Recovery": 1, "CRC": 12} and found[1].errors == {}
    assert nvidia_smi.nvlink_problems(found, found) == []
    later = nvidia_smi.parse_nvlinks(STATUS, ERRORS.replace("Replay Errors: 2", "Replay Errors: 5"))
    assert nvidia_smi.nvlink_problems(found, later) == [
        "GPU 0: 3 NVLink replay errors during the check"
    ]
    assert nvidia_smi.parse_nvlinks("NVML: Unable to retrieve NVLink information", "") == {}


def test_infiniband_ports(tmp_path):
    def write(device: str, **files: str) -> None:
        port = tmp_path / device / "ports" / "1"
        (port / "counters").mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (port / name.replace("__", "/")).write_text(f"{text}\n")

    assert read_ports(tmp_path) == {}
    write("mlx5_0", state="4: ACTIVE", phys_state="5: LinkUp", rate="400 Gb/sec (4X NDR)")
    write("mlx5_0", counters__symbol_error="3", counters__link_downed="1")
    write("mlx5_1", state="1: DOWN", phys_state="3: Disabled", rate="10 Gb/sec (4X SDR)")
    before = read_ports(tmp_path)
    assert (before["mlx5_0/1"].state, before["mlx5_0/1"].gigabits) == ("ACTIVE", 400.0)
    assert before["mlx5_0/1"].counters == {"symbol_error": 3, "link_downed": 1}
    assert (before["mlx5_1/1"].state, before["mlx5_1/1"].physical) == ("DOWN", "Disabled")
    assert counter_problems(before, before) == []
    write("mlx5_0", counters__symbol_error="13", counters__link_downed="2")
    assert counter_problems(before, read_ports(tmp_path)) == [
        "mlx5_0/1: link_downed increased by 1 during the check"
    ]


@given(
    st.lists(
        st.sampled_from(
            [*STATUS.split(), *ERRORS.split(), *DMESG.split(), "\n", "0x", "²", "-1", "."]
        )
        | st.text(max_size=3),
        max_size=40,
    )
)
def test_no_output_makes_a_parser_fail(words):
    for text in (" ".join(words), "".join(words)):
        rows = nvidia_smi.parse_rows(text.replace(" ", ","), nvidia_smi.GPU_FIELDS)
        nvidia_smi.gpu_problems(rows, 1)
        nvidia_smi.slowdown_problems(rows)
        nvidia_smi.remapping_problems(rows)
        nvidia_smi.parse_nvlinks(text, text)
        xid_problems(parse_xids(text), 0.0, 1.0)


def test_hardware_errors_in_the_kernel_log():
    xids = parse_xids(DMESG)
    assert [xid.code for xid in xids] == [48, 31, 79, 79]
    assert xid_problems(xids, uptime=97200.5, hours=24) == [
        "GPU 0000:83:00: Xid 79 (GPU has fallen off the bus) 1.0 h ago"
    ]
    assert len(xid_problems(xids, uptime=97200.5, hours=48)) == 2
    assert parse_xids("") == []
