"""The script with which bash and zsh complete commands, flags and experiments."""

import shlex
from collections.abc import Mapping, Sequence

from absl import flags

from cnn_jax.analysis.explain.topics import OF_A_NETWORK, TOPICS
from cnn_jax.cli.flags import FLAGS, Command
from cnn_jax.common.errors import ConfigError

SHELLS = ("bash", "zsh")

# zsh loads completions of bash with its bashcompinit.
_SCRIPT = """# Shell completion of cnn_jax. Put this line into ~/.{shell}rc:
#   source <({program} completion {shell})
{head}_cnn_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} flags='' words=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={commands}
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  case $word in
    -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word")) ;;
  esac
}}
complete -o nosort -o filenames -F _cnn_jax cnn_jax launch.sh ./launch.sh
"""


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
    if shell not in SHELLS:
        raise ConfigError(f"{shell}: must be bash or zsh")
    known = {"experiment": experiments, "topic": (*TOPICS, OF_A_NETWORK), "shell": SHELLS}
    cases = []
    for name, command in commands.items():
        own = " ".join(f"--{flag}{'' if _is_switch(flag) else '='}" for flag in command.flags)
        words = " ".join(known.get(command.positional[0], ()) if command.positional else ())
        cases.append(f"      {name}) flags={shlex.quote(own)} words={shlex.quote(words)} ;;")
    return _SCRIPT.format(
        shell=shell,
        program=program,
        head="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        commands=shlex.quote(" ".join(commands)),
        cases="\n".join(cases),
    )


def _is_switch(flag: str) -> bool:
    return FLAGS[flag].define is flags.DEFINE_bool
