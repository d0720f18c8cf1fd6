//! Shorter programs that say the same.
//!
//! `seccompiler` compares the call's number with one rule after the other, and loads each argument anew. The
//! kernel checks, translates and compiles every instruction when a filter is installed, and runs it once for
//! each call there is, to remember those that pass whatever their arguments are: for 500 instructions that
//! takes a third of a millisecond, in every process, before it can begin. Here a program becomes a
//! binary search for the number, and behind it the comparisons of arguments that the number leaves open:
//! a third of the instructions, of which a call passes ten.

use seccompiler::{BpfProgram, sock_filter};
use std::collections::{BTreeMap, BTreeSet};

/// `linux/bpf_common.h`: what `seccompiler` makes, and no more.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const EQUAL: u16 = 0x15;
const GREATER: u16 = 0x25;
const AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

/// What a program begins with, and keeps: it compares the architecture.
const PROLOGUE: usize = 3;
/// Where the number of a call is in `struct seccomp_data`.
const NUMBER: u32 = 0;

/// Where the accumulator's value comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Value {
    offset: u32,
    mask: u32,
}

/// What is left to be done.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Rest {
    Answer(u32),
    Compare(Box<Compare>),
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Compare {
    value: Value,
    code: u16,
    with: u32,
    yes: Rest,
    no: Rest,
}

/// A program that answers every call as `program` does.
pub(crate) fn shorten(program: &BpfProgram) -> Result<BpfProgram, String> {
    let prologue = program.get(..PROLOGUE).ok_or("no architecture is checked")?;
    let mut numbers = BTreeSet::new();
    let other = rest(program, PROLOGUE, None, None, &mut numbers)?;
    // Where what is to be done begins to differ from what came before.
    let mut ranges = vec![(0, other.clone())];
    for number in numbers {
        let own = rest(program, PROLOGUE, None, Some(number), &mut BTreeSet::new())?;
        let next = number
            .checked_add(1)
            .ok_or("a call with the last of all numbers")?;
        ranges.pop_if(|(start, _)| *start == number);
        ranges.push((number, own));
        ranges.push((next, other.clone()));
    }
    ranges.dedup_by(|next, before| next.1 == before.1);
    if ranges.len() < 2 {
        return Ok(program.clone());
    }
    let mut code = Assembler::default();
    code.lines.push(Line::Load(Value {
        offset: NUMBER,
        mask: !0,
    }));
    code.search(&ranges);
    code.give_answers();
    code.comparisons();
    let mut short = prologue.to_vec();
    short.extend(code.finish()?);
    Ok(short)
}

/// What `program` does from `place` on with the accumulator set to `value`, for the call `number` or any that it
/// does not name; the numbers that it names go to `named`.
fn rest(
    program: &[sock_filter],
    place: usize,
    value: Option<Value>,
    number: Option<u32>,
    named: &mut BTreeSet<u32>,
) -> Result<Rest, String> {
    let i = program.get(place).ok_or("a jump out of the program")?;
    let next = place + 1;
    let unset = "a comparison of nothing";
    match i.code {
        LOAD => {
            let value = Value {
                offset: i.k,
                mask: !0,
            };
            rest(program, next, Some(value), number, named)
        }
        AND => {
            let Value { offset, mask } = value.ok_or(unset)?;
            let mask = mask & i.k;
            rest(program, next, Some(Value { offset, mask }), number, named)
        }
        JUMP => rest(program, next + i.k as usize, value, number, named),
        RETURN => Ok(Rest::Answer(i.k)),
        EQUAL | GREATER | AT_LEAST => {
            let compared = value.ok_or(unset)?;
            let (yes, no) = (next + usize::from(i.jt), next + usize::from(i.jf));
            if compared.offset == NUMBER {
                if i.code != EQUAL || compared.mask != !0 {
                    return Err("a call's number is compared in another way".into());
                }
                named.insert(i.k);
                let taken = if number == Some(i.k) { yes } else { no };
                return rest(program, taken, value, number, named);
            }
            let yes = rest(program, yes, value, number, named)?;
            let no = rest(program, no, value, number, named)?;
            if yes == no {
                return Ok(yes);
            }
            Ok(Rest::Compare(Box::new(Compare {
                value: compared,
                code: i.code,
                with: i.k,
                yes,
                no,
            })))
        }
        other => Err(format!("instruction {other:#x}")),
    }
}

/// Adds `compare` behind all that follows from it.
fn in_order(compare: &Compare, order: &mut Vec<Compare>) {
    for rest in [&compare.no, &compare.yes] {
        if let Rest::Compare(next) = rest {
            in_order(next, order);
        }
    }
    if !order.contains(compare) {
        order.push(compare.clone());
    }
}

/// A place in the program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Label(usize);

enum Line {
    Load(Value),
    Compare(u16, u32, Label, Label),
    Jump(Label),
    Return(u32),
}

impl Line {
    /// In instructions.
    fn length(&self) -> usize {
        match self {
            Self::Load(value) if value.mask != !0 => 2,
            _ => 1,
        }
    }
}

/// Lines, and where labels are.
#[derive(Default)]
struct Assembler {
    lines: Vec<Line>,
    places: BTreeMap<Label, usize>,
    labels: usize,
    /// The answers that lines since the last [`Assembler::give_answers`] jump to.
    answers: BTreeMap<u32, Label>,
    /// What the search leads to, beside answers.
    found: Vec<(Label, Compare)>,
}

impl Assembler {
    fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels)
    }

    fn here(&mut self, label: Label) {
        self.places.insert(label, self.lines.len());
    }

    fn answer(&mut self, answer: u32) -> Label {
        if let Some(label) = self.answers.get(&answer) {
            return *label;
        }
        let label = self.label();
        self.answers.insert(answer, label);
        label
    }

    /// Comparisons jump a short way only: each part of a program has answers of its own.
    fn give_answers(&mut self) {
        for (answer, label) in std::mem::take(&mut self.answers) {
            self.here(label);
            self.lines.push(Line::Return(answer));
        }
    }

    /// A binary search in `ranges`, each with its first number, for the number that is loaded.
    fn search(&mut self, ranges: &[(u32, Rest)]) {
        if let [(_, around), (number, own), (next, behind)] = ranges
            && next - number == 1
            && around == behind
        {
            let (yes, no) = (self.found(own), self.found(around));
            self.lines.push(Line::Compare(EQUAL, *number, yes, no));
            return;
        }
        let (low, high) = ranges.split_at(ranges.len() / 2);
        let from = high.first().map_or(0, |(from, _)| *from);
        let mut label_of = |side: &[(u32, Rest)]| match side {
            [(_, only)] => self.found(only),
            _ => self.label(),
        };
        let (no, yes) = (label_of(low), label_of(high));
        self.lines.push(Line::Compare(AT_LEAST, from, yes, no));
        for (side, label) in [(low, no), (high, yes)] {
            if side.len() > 1 {
                self.here(label);
                self.search(side);
            }
        }
    }

    /// Where the search leads for numbers with `rest` to be done.
    fn found(&mut self, rest: &Rest) -> Label {
        match rest {
            Rest::Answer(answer) => self.answer(*answer),
            Rest::Compare(compare) => {
                let label = self.label();
                self.found.push((label, (**compare).clone()));
                label
            }
        }
    }

    /// The comparisons that the search leads to.
    fn comparisons(&mut self) {
        let found = std::mem::take(&mut self.found);
        let blocks: Vec<_> = found.iter().map(|_| self.label()).collect();
        for ((from, _), block) in found.iter().zip(&blocks) {
            self.here(*from);
            self.lines.push(Line::Jump(*block));
        }
        for ((_, compare), block) in found.into_iter().zip(blocks) {
            self.block(compare, block);
            self.give_answers();
        }
    }

    /// `first` and all that follows from it, each comparison once. One whose value was compared just before
    /// is entered behind its load.
    fn block(&mut self, first: Compare, label: Label) {
        let mut order = Vec::new();
        in_order(&first, &mut order);
        order.reverse();
        let mut entries = BTreeMap::from([((first, false), label)]);
        for compare in &order {
            for rest in [&compare.no, &compare.yes] {
                if let Rest::Compare(next) = rest {
                    let entry = ((**next).clone(), next.value == compare.value);
                    entries.entry(entry).or_insert_with(|| self.label());
                }
            }
        }
        for compare in order {
            if let Some(label) = entries.get(&(compare.clone(), false)) {
                self.here(*label);
                self.lines.push(Line::Load(compare.value));
            }
            if let Some(label) = entries.get(&(compare.clone(), true)) {
                self.here(*label);
            }
            let mut to = |rest: &Rest| match rest {
                Rest::Answer(answer) => self.answer(*answer),
                Rest::Compare(next) => entries[&((**next).clone(), next.value == compare.value)],
            };
            let (yes, no) = (to(&compare.yes), to(&compare.no));
            self.lines
                .push(Line::Compare(compare.code, compare.with, yes, no));
        }
    }

    fn finish(self) -> Result<BpfProgram, String> {
        let mut starts = vec![0];
        for line in &self.lines {
            starts.push(starts[starts.len() - 1] + line.length());
        }
        let mut program = BpfProgram::new();
        for line in &self.lines {
            let next = program.len() + 1;
            let distance = |label: &Label| {
                let place = self.places.get(label).ok_or("a label that is nowhere")?;
                starts[*place].checked_sub(next).ok_or("a jump back")
            };
            let short = |label| -> Result<u8, String> {
                u8::try_from(distance(label)?).map_err(|_| "too much to jump over".into())
            };
            let mut add = |code, jt, jf, k| program.push(sock_filter { code, jt, jf, k });
            match line {
                Line::Load(value) => {
                    add(LOAD, 0, 0, value.offset);
                    if value.mask != !0 {
                        add(AND, 0, 0, value.mask);
                    }
                }
                Line::Compare(code, with, yes, no) => add(*code, short(yes)?, short(no)?, *with),
                Line::Jump(label) => {
                    let far = u32::try_from(distance(label)?).map_err(|e| e.to_string())?;
                    add(JUMP, 0, 0, far);
                }
                Line::Return(answer) => add(RETURN, 0, 0, *answer),
            }
        }
        Ok(program)
    }
}
