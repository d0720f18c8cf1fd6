//! The policy language (see `policy/README.md`): reading, checking, compiling.

use crate::constants;
use crate::shorten::shorten;
use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

/// One line of a policy.
pub(crate) struct Rule {
    pub(crate) syscall: String,
    /// As written, without the call's name; empty when the call is allowed whatever it is given.
    pub(crate) condition: String,
    pub(crate) reason: String,
    /// `FILE:LINE`.
    pub(crate) place: String,
    pub(crate) tests: Vec<Test>,
}

/// One comparison of one argument.
pub(crate) struct Test {
    pub(crate) index: u8,
    wide: bool,
    op: String,
    mask: Option<u64>,
    pub(crate) value: u64,
}

impl Test {
    /// Whether a call with these arguments satisfies it: what the compiled program must say, too.
    #[allow(dead_code, reason = "only the tests of policies ask")]
    pub(crate) fn holds(&self, arguments: &[u64; 6]) -> bool {
        let given = arguments[usize::from(self.index)];
        let given = if self.wide { given } else { given & 0xFFFF_FFFF };
        match self.op.as_str() {
            "eq" => given & self.mask.unwrap_or(u64::MAX) == self.value,
            "ne" => given != self.value,
            "lt" => given < self.value,
            "le" => given <= self.value,
            "gt" => given > self.value,
            _ => given >= self.value,
        }
    }

    fn operator(&self) -> String {
        match self.mask {
            Some(mask) => format!("{{\"masked_eq\": {mask}}}"),
            None => format!("\"{}\"", self.op),
        }
    }
}

/// What is wrong with a policy, and where.
#[derive(Debug)]
pub(crate) struct PolicyError {
    place: String,
    message: String,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

/// Reads `FOLDER/NAME.policy` and what it includes.
pub(crate) fn load(folder: &Path, name: &str) -> Result<Vec<Rule>, PolicyError> {
    let path = folder.join(name).with_extension("policy");
    let text = fs::read_to_string(&path).map_err(|e| PolicyError {
        place: path.display().to_string(),
        message: e.to_string(),
    })?;
    parse(&format!("{name}.policy"), &text, &|include| load(folder, include))
}

/// Reads the text of one policy; `include` gives the rules of another.
pub(crate) fn parse(
    file: &str,
    text: &str,
    include: &dyn Fn(&str) -> Result<Vec<Rule>, PolicyError>,
) -> Result<Vec<Rule>, PolicyError> {
    let mut rules = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{file}:{}", index + 1);
        let (code, reason) = line.split_once('#').unwrap_or((line, ""));
        let code = code.trim();
        if code.is_empty() {
            continue;
        }
        if code.starts_with(OPCODE) {
            continue;
        }
        if let Some(name) = code.strip_prefix("include ") {
            rules.extend(include(name.trim())?);
            continue;
        }
        let rule = parse_rule(code, reason.trim(), &place).map_err(|message| PolicyError {
            place: place.clone(),
            message,
        })?;
        rules.push(rule);
    }
    check_overlap(&rules)?;
    Ok(rules)
}

/// What the role's ring may be asked for: a filter does not see it.
pub(crate) struct Opcode {
    pub(crate) name: String,
    pub(crate) number: u8,
    pub(crate) reason: String,
    /// `FILE:LINE`.
    pub(crate) place: String,
}

/// A line that names an opcode begins so.
const OPCODE: &str = "io_uring ";

/// The opcodes in `FOLDER/NAME.policy`.
pub(crate) fn load_opcodes(folder: &Path, name: &str) -> Result<Vec<Opcode>, PolicyError> {
    let path = folder.join(name).with_extension("policy");
    let text = fs::read_to_string(&path).map_err(|e| PolicyError {
        place: path.display().to_string(),
        message: e.to_string(),
    })?;
    let mut opcodes = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let (code, reason) = line.split_once('#').unwrap_or((line, ""));
        let Some(name) = code.trim().strip_prefix(OPCODE) else {
            continue;
        };
        let (name, reason) = (name.trim(), reason.trim());
        let place = format!(
            "{}.policy:{}",
            path.file_stem().unwrap_or_default().display(),
            index + 1
        );
        let number = constants::lookup(name).and_then(|number| u8::try_from(number).ok());
        let (Some(number), false) = (number, reason.is_empty()) else {
            let message = format!("'{name}' is not in build/constants.rs, or gives no reason");
            return Err(PolicyError { place, message });
        };
        opcodes.push(Opcode {
            name: name.to_owned(),
            number,
            reason: reason.to_owned(),
            place,
        });
    }
    Ok(opcodes)
}

fn parse_rule(code: &str, reason: &str, place: &str) -> Result<Rule, String> {
    if reason.is_empty() {
        return Err(format!("'{code}' gives no reason: add '# why'"));
    }
    let (syscall, condition) = code.split_once(char::is_whitespace).unwrap_or((code, ""));
    let condition = condition.trim();
    let tests = if condition.is_empty() {
        Vec::new()
    } else {
        condition
            .split("&&")
            .map(|test| parse_test(test.trim()))
            .collect::<Result<_, _>>()?
    };
    let rule = Rule {
        syscall: syscall.to_owned(),
        condition: condition.to_owned(),
        reason: reason.to_owned(),
        place: place.to_owned(),
        tests,
    };
    // Compiling the rule alone finds a misspelt call here, where its line is known.
    compile(std::slice::from_ref(&rule), "kill_process").map_err(|e| e.message)?;
    Ok(rule)
}

/// `argN[:64] [& MASK] OP VALUE`
fn parse_test(text: &str) -> Result<Test, String> {
    let mut words = text.split_whitespace();
    let mut next = |what: &str| words.next().ok_or(format!("'{text}': {what} is missing"));
    let argument = next("the argument")?;
    let (name, wide) = match argument.strip_suffix(":64") {
        Some(name) => (name, true),
        None => (argument, false),
    };
    let index = name
        .strip_prefix("arg")
        .and_then(|digits| digits.parse().ok())
        .filter(|index| *index < 6)
        .ok_or(format!("'{argument}' is no argument: write arg0 to arg5"))?;
    let mut op = next("the comparison")?.to_owned();
    let mut mask = None;
    if op == "&" {
        mask = Some(value(next("the mask")?, wide)?);
        op = next("'=='")?.to_owned();
    }
    let value = value(next("the value")?, wide)?;
    if let Some(rest) = words.next() {
        return Err(format!("'{rest}' is too much: join conditions with '&&'"));
    }
    let op = match (op.as_str(), mask) {
        ("==", _) => "eq",
        ("!=", None) => "ne",
        ("<", None) => "lt",
        ("<=", None) => "le",
        (">", None) => "gt",
        (">=", None) => "ge",
        (op, _) => return Err(format!("'{op}' is no comparison here")),
    };
    Ok(Test {
        index,
        wide,
        op: op.to_owned(),
        mask,
        value,
    })
}

/// A number, a named constant, or several joined by `|`.
fn value(text: &str, wide: bool) -> Result<u64, String> {
    let mut all = 0;
    for part in text.split('|') {
        all |= if let Some(hex) = part.strip_prefix("0x") {
            u64::from_str_radix(hex, 16).map_err(|_| format!("'{part}' is no number"))?
        } else if part.starts_with(|c: char| c.is_ascii_digit()) {
            part.parse().map_err(|_| format!("'{part}' is no number"))?
        } else {
            constants::lookup(part).ok_or(format!("'{part}' is not in build/constants.rs: add it there"))?
        };
    }
    if !wide && u32::try_from(all).is_err() {
        return Err(format!("'{text}' needs 64 bits: write argN:64"));
    }
    Ok(all)
}

/// A call that is allowed outright makes every other rule for it redundant, and so is the same
/// rule twice: both are slips.
fn check_overlap(rules: &[Rule]) -> Result<(), PolicyError> {
    let mut seen: BTreeMap<&str, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        let others = seen.entry(&rule.syscall).or_default();
        if let Some(other) = others
            .iter()
            .find(|o| o.condition == rule.condition || o.tests.is_empty() || rule.tests.is_empty())
        {
            return Err(PolicyError {
                place: rule.place.clone(),
                message: format!("'{}' is already ruled at {}", rule.syscall, other.place),
            });
        }
        others.push(rule);
    }
    Ok(())
}

/// The BPF program that allows what `rules` allow and answers everything else with `action`.
pub(crate) fn compile(rules: &[Rule], action: &str) -> Result<BpfProgram, PolicyError> {
    compile_plainly(rules, action)
        .and_then(|program| shorten(&program))
        .map_err(|message| PolicyError {
            place: rules.first().map_or("policy".into(), |r| r.place.clone()),
            message,
        })
}

/// As `seccompiler` makes it.
pub(crate) fn compile_plainly(rules: &[Rule], action: &str) -> Result<BpfProgram, String> {
    let filter: Vec<String> = rules.iter().map(rule_json).collect();
    let json = format!(
        "{{\"it\": {{\"mismatch_action\": \"{action}\", \"match_action\": \"allow\", \
         \"filter\": [{}]}}}}",
        filter.join(",")
    );
    compile_from_json(json.as_bytes(), TargetArch::x86_64)
        .map_err(|e| e.to_string())
        .and_then(|mut map| map.remove("it").ok_or("nothing was compiled".into()))
}

fn rule_json(rule: &Rule) -> String {
    if rule.tests.is_empty() {
        return format!("{{\"syscall\": {:?}}}", rule.syscall);
    }
    let tests: Vec<String> = rule
        .tests
        .iter()
        .map(|t| {
            format!(
                "{{\"index\": {}, \"type\": \"{}\", \"op\": {}, \"val\": {}}}",
                t.index,
                if t.wide { "qword" } else { "dword" },
                t.operator(),
                t.value
            )
        })
        .collect();
    format!(
        "{{\"syscall\": {:?}, \"args\": [{}]}}",
        rule.syscall,
        tests.join(",")
    )
}
