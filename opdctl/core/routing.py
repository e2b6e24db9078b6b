"""Which teacher scores which domain."""

from __future__ import annotations

from opdctl.settings import Teacher


def routes(domains: dict[str, float], teachers: dict[str, Teacher]) -> dict[str, list[str]]:
    """Domain -> names of the teachers that serve it.

    A teacher serves what ``serves`` says; without it the domain of its name; and the only one, if
    it is called ``teacher``, all of them.
    """
    serving: dict[str, list[str]] = {domain: [] for domain in domains}
    for name, teacher in teachers.items():
        chosen = [d for d, on in teacher.serves.items() if on]
        if not teacher.serves:
            alone = len(teachers) == 1 and name == "teacher" and name not in domains
            chosen = list(domains) if alone else [name]
        for domain in chosen:
            serving.setdefault(domain, []).append(name)
    return serving
