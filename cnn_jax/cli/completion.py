"""The script with which bash and zsh complete commands, flags and experiments."""

import shlex
from collections.abc import Mapping, Sequence

from absl import flags

from cnn_jax.analysis.explain.topics import OF_A_NETWORK, TOPICS
from cnn_jax.cli.flags import FLAGS, Command
from cnn_jax.common.errors import ConfigError

_SCRIPT = """# Shell completion of cnn_jax. Put this line into ~/.{shell}rc:
#   source <({program} completion {shell})
{load}_cnn_jax() {{
  local {word} {command} {position} flags='' names=''
  if [ "$position" -eq 1 ]; then
    names={commands}
  else
    case $command in
{cases}
    esac
  fi
{reply}
}}
{register}
"""
_PARTS = {
    "bash": {
        "load": "",
        "word": "word=${COMP_WORDS[COMP_CWORD]}",
        "command": "command=${COMP_WORDS[1]}",
        "position": "position=$COMP_CWORD",
        "reply": """  case $word in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$names" -- "$word") $(compgen -f -- "$word")) ;;
  esac""",
        "register": "complete -o nosort -o filenames -F _cnn_jax cnn_jax launch.sh ./launch.sh",
    },
    "zsh": {
        "load": "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n",
        "word": "word=$PREFIX",
        "command": "command=${words[2]}",
        "position": "position=$((CURRENT - 1))",
        "reply": """  case $word in
    -*) compadd -S '' -- ${=flags} ;;
    *) compadd -- ${=names}; _files ;;
  esac""",
        "register": "compdef _cnn_jax cnn_jax launch.sh",
    },
}


def script(
    shell: str, program: str, commands: Mapping[str, Command], experiments: Sequence[str]
) -> str:
    """The completion script for a shell.

    Args:
      shell: "bash" or "zsh".
      program: the command that starts the program.
      commands: by name.
      experiments: the names that --experiment takes.

    Raises:
      ConfigError: `shell` is neither.
    """
    if shell not in _PARTS:
        raise ConfigError(f"{shell}: must be bash or zsh")
    known = {"experiment": experiments, "topic": (*TOPICS, OF_A_NETWORK), "shell": _PARTS}
    cases = []
    for name, command in commands.items():
        own = " ".join(f"--{flag}{'' if _is_switch(flag) else '='}" for flag in command.flags)
        names = " ".join(known.get(command.positional[0], ()) if command.positional else ())
        cases.append(f"      {name}) flags={shlex.quote(own)} names={shlex.quote(names)} ;;")
    return _SCRIPT.format(
        shell=shell,
        program=program,
        commands=shlex.quote(" ".join(commands)),
        cases="\n".join(cases),
        **_PARTS[shell],
    )


def _is_switch(flag: str) -> bool:
    return FLAGS[flag].define is flags.DEFINE_bool
