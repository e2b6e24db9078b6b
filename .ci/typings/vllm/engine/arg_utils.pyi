from dataclasses import dataclass

@dataclass
class EngineArgs: ...
