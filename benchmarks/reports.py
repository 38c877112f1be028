"""The JSON files in results/: which of them the pages show, and what they were measured on."""

import json
from dataclasses import asdict

from benchmarks.measure import RESULTS
from benchmarks.pictures import PLOTTED
from benchmarks.registry import Size

DTYPES = ("float32", "bfloat16", "float16")


def reports_of(kind: str) -> list[dict]:
    """The content of results/<kind>-*.json, the oldest first, with its name as `file`."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in RESULTS.glob(f"{kind}-*.json")]
    return sorted(found, key=lambda report: (report["file"][-15:], report["date"]))


def newest_of_each_gpu() -> list[tuple[dict, dict | None]]:
    """For each GPU the newest device-*.json that has steps, and the newest without-logits-*.json if it is newer; the newest GPU first."""
    first, again = ({r["device"]["name"]: r for r in reports_of(kind) if r.get("steps")} for kind in ("device", "without-logits"))
    order = sorted(first.items(), key=lambda item: item[1]["date"], reverse=True)
    found = [(report, again.get(name)) for name, report in order]
    return [(report, later if later and later["date"] > report["date"] else None) for report, later in found]


def newest_of_each_cpu(kind: str) -> list[dict]:
    """The newest results/<kind>-*.json of each kind of CPU, the newest of all first."""
    return list({cpu_of(report): report for report in reports_of(kind) if report.get("steps")}.values())[::-1]


def cpu_of(report: dict) -> tuple[str, str]:
    return report["device"]["name"], report["device"]["vectors"]


def size_of(report: dict) -> dict:
    """That of the steps, or of log-probs alone."""
    return (report.get("steps") or report["ops"])[0]["size"]


def newest_of_each_size() -> list[dict]:
    """The newest cpu-<dtype>-*.json for every dtype, size and CPU; the default size first, of its CPUs the one of the newest file.

    Other parts that it lacks, or some curves of, are those of the file before, or of a later one without steps, whose `machine` then
    stands in `parts_of`.
    """
    found, parts = {}, ("ops", "roofline", "scaling")
    for report in reports_of("cpu"):
        report |= {"parts_of": {}, "newest": report["date"]}
        key = report["dtype"], tuple(size_of(report).values()), cpu_of(report)
        before = found.get(key, {"parts_of": {}})
        if report.get("steps") or not before.get("steps"):
            for part in parts:
                if len(report.get(part, ())) < len(before.get(part, ())):
                    report[part], report["parts_of"][part] = before[part], before["parts_of"].get(part, machine(before))
                    report["where_" + part] = before.get("where_" + part) or measured_where(before)
            found[key] = report
            continue
        before["newest"] = report["date"]
        for part in filter(report.get, parts):
            before[part], before["parts_of"][part] = report[part], machine(report)
            before["where_" + part] = measured_where(report)
    order = sorted(found.values(), key=lambda report: report["newest"], reverse=True)
    return sorted(order, key=lambda report: (DTYPES.index(report["dtype"]), not of_default_size(report), list(size_of(report).values())))


def of_default_size(report: dict) -> bool:
    """Whether a report has README's figures."""
    return size_of(report) == asdict(Size())


def pictured(reports: list[dict]) -> dict[tuple[str, str], dict]:
    """The report of the picture of (part, dtype): the first of the default size that has such a part and steps."""
    whole = [report for report in reports if of_default_size(report) and report.get("steps")]
    return {(part, report["dtype"]): report for report in reversed(whole) for part in PLOTTED if report.get(part)}


def red(report: dict) -> bool:
    """Whether tests of the measured functions did not all pass: on a GPU; on a CPU nothing is measured then."""
    return "sms" in report.get("device", {}) and not report.get("tests", {}).get("passed")


def cpu_text(report: dict) -> str:
    name, vectors = cpu_of(report)
    return f"{name.replace('(R)', '').replace(' Processor', '')}, {vectors.replace('AVX512', 'AVX-512')}"


def machine(report: dict) -> str:
    """What a file was measured on, and how."""
    device = report["device"]
    what = f"{device.get('sms')} SMs, driver {report.get('driver', '?')}"
    if "cores" in device:
        what = f"{device['cores']} cores, {device['threads']} threads, {device['vectors']}, load {device['load_before']:.1f} before"
        what += ", freed memory kept" if report.get("keeps_freed_memory") else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    file = f"[{report['file']}](results/{report['file']})"
    told = "".join(f" {text}" for text in (f"`{report['command']}`." if "command" in report else "", report.get("note", "")) if text)
    return f"{file}: {device['name']}, {what}; {versions}; revision {report['revision']}, {report['date'][:10]}.{told}"


def measured_where(report: dict) -> str:
    file = f"[{report['dtype']}](benchmarks/results/{report['file']})"
    return f"{file}, {report['device']['cores']} cores of an {cpu_text(report)}, revision {report['revision']}"
