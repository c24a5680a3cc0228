//! One expression over a row: the context of a registered column, or the source of a live one.
//!
//! Called by the registration, the triggers and src/worker/. Parsed as an index expression is, so
//! that subqueries, aggregates and set-returning functions are refused by the parser itself, planned,
//! and refused unless everything in it is IMMUTABLE. The caller has pinned the search path and
//! acts as the table's owner: the expression is the owner's code.

use pgrx::pg_sys;

use crate::error::{Error, Result};

/// A prepared expression; lives as long as the memory context it was made in.
pub struct Expression {
    state: *mut pg_sys::ExprState,
    context: *mut pg_sys::ExprContext,
    /// The type of its value.
    pub type_oid: pg_sys::Oid,
    /// The columns that it reads.
    pub reads: Vec<i16>,
}

/// What an expression is for, in the words of its errors.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Use {
    name: &'static str,
    example: &'static str,
}

/// The value is text.
const CONTEXT: Use = Use {
    name: "context",
    example: "Give one expression over columns of the row, for example \
     rekey.context('customer.email', id::text).",
};
/// The value is of any type.
const SOURCE: Use = Use {
    name: "source",
    example: "Give one expression over columns of the row, for example \
     convert_from(decrypt(email, key, 'aes'), 'UTF8').",
};

impl Use {
    fn refused(self, detail: &str, hint: &str) -> Error {
        Error::Argument(
            format!("the {} is not a usable expression", self.name),
            detail.to_string(),
            hint.to_string(),
        )
    }
}

impl Expression {
    /// Parses and plans a context over the columns of `relation`.
    pub fn prepare(relation: pg_sys::Relation, text: &str, sealed: &[i16]) -> Result<Expression> {
        Self::parse(CONTEXT, relation, text, sealed)
    }

    /// Parses and plans the source of a live column.
    pub fn source(relation: pg_sys::Relation, text: &str, sealed: &[i16]) -> Result<Expression> {
        Self::parse(SOURCE, relation, text, sealed)
    }

    fn parse(
        of: Use,
        relation: pg_sys::Relation,
        text: &str,
        sealed: &[i16],
    ) -> Result<Expression> {
        let refused = |detail: &str, hint: &str| of.refused(detail, hint);
        let server = super::text::to_server(text.as_bytes())?.into_owned();
        let source =
            std::ffi::CString::new(server).map_err(|_| refused("It has a NUL.", of.example))?;
        // SAFETY: the steps of ComputeIndexAttrs and index_create for an expression; nodes live in
        // the current memory context, the relation is open and locked.
        unsafe {
            let target = single_target(of, &source)?;
            let state = pg_sys::make_parsestate(std::ptr::null_mut());
            (*state).p_sourcetext = source.as_ptr();
            let item = pg_sys::addRangeTableEntryForRelation(
                state,
                relation,
                pg_sys::AccessShareLock as i32,
                std::ptr::null_mut(),
                false,
                true,
            );
            pg_sys::addNSItemToQuery(state, item, true, true, true);
            let kind = pg_sys::ParseExprKind::EXPR_KIND_INDEX_EXPRESSION;
            let raw = pg_sys::transformExpr(state, target, kind);
            let found = pg_sys::exprType(raw);
            // Strings of all types are sealed as text, as a call of encrypt_col would.
            let text =
                of == CONTEXT || found == pg_sys::UNKNOWNOID || super::types::is_string(found);
            let wanted = if text { pg_sys::TEXTOID } else { found };
            let node = pg_sys::coerce_to_target_type(
                state,
                raw,
                found,
                wanted,
                -1,
                pg_sys::CoercionContext::COERCION_ASSIGNMENT,
                pg_sys::CoercionForm::COERCE_IMPLICIT_CAST,
                -1,
            );
            if node.is_null() {
                return Err(refused("Its type cannot become text.", of.example));
            }
            pg_sys::assign_expr_collations(state, node);
            pg_sys::free_parsestate(state);
            let planned = pg_sys::expression_planner(node.cast());
            if pg_sys::contain_mutable_functions(planned.cast()) {
                return Err(refused(
                    "Not all of it is IMMUTABLE: the same row could give another value later.",
                    "Convert what is not text by itself: rekey.context('x', id::text) instead of \
                     'x' || id.",
                ));
            }
            let mut used: *mut pg_sys::Bitmapset = std::ptr::null_mut();
            pg_sys::pull_varattnos(planned.cast(), 1, &mut used);
            let low = pg_sys::FirstLowInvalidHeapAttributeNumber;
            if sealed
                .iter()
                .any(|column| pg_sys::bms_is_member(i32::from(*column) - low, used))
            {
                return Err(refused(
                    "It uses a sealed column, which changes with each re-encryption.",
                    of.example,
                ));
            }
            if (low..=0).any(|system| pg_sys::bms_is_member(system - low, used)) {
                return Err(refused(
                    "It uses a system column or the whole row, which change with each update.",
                    of.example,
                ));
            }
            let table = (*relation).rd_id;
            let mut reads: Vec<i16> = (1..=(*(*relation).rd_rel).relnatts).collect();
            reads.retain(|column| pg_sys::bms_is_member(i32::from(*column) - low, used));
            if reads
                .iter()
                .any(|column| super::relation::is_generated(table, *column))
            {
                return Err(refused(
                    "It uses a generated column, which is not there yet when a trigger looks.",
                    of.example,
                ));
            }
            Ok(Expression {
                state: pg_sys::ExecInitExpr(planned, std::ptr::null_mut()),
                context: pg_sys::CreateStandaloneExprContext(),
                type_oid: wanted,
                reads,
            })
        }
    }

    /// The text for the row in `slot`, in UTF-8; None for NULL. Raises what the expression raises.
    pub fn evaluate(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Option<Vec<u8>>> {
        let value = self.value(slot)?;
        let utf8 = |datum| Ok(super::text::to_utf8(super::text::detoasted(datum))?.into_owned());
        value.map(utf8).transpose()
    }

    /// The value for the row in `slot`, which lives until the next one is asked for; None for NULL.
    /// Raises what the expression raises.
    pub fn value(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Option<pg_sys::Datum>> {
        // SAFETY: the slot holds a row of the relation that the expression was prepared for. The
        // evaluation function is called as ExecEvalExpr does, under pgrx's guard.
        unsafe {
            pg_sys::MemoryContextReset((*self.context).ecxt_per_tuple_memory);
            (*self.context).ecxt_scantuple = slot;
            let previous = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = (*self.context).ecxt_per_tuple_memory;
            let mut null = false;
            let datum = match (*self.state).evalfunc {
                Some(evaluate) => pg_sys::ffi::pg_guard_ffi_boundary(|| {
                    evaluate(self.state, self.context, &mut null)
                }),
                None => return Err(Error::Internal("an expression is not ready".to_string())),
            };
            pg_sys::CurrentMemoryContext = previous;
            Ok((!null).then_some(datum))
        }
    }
}

/// The one plain expression that the text consists of.
///
/// # Safety
/// In a transaction.
unsafe fn single_target(of: Use, source: &std::ffi::CStr) -> Result<*mut pg_sys::Node> {
    let plain = || of.refused("It is more than one plain expression.", of.example);
    // SAFETY: the grammar of RAW_PARSE_PLPGSQL_EXPR gives a list of one RawStmt with a SelectStmt.
    unsafe {
        let list = pg_sys::raw_parser(
            source.as_ptr(),
            pg_sys::RawParseMode::RAW_PARSE_PLPGSQL_EXPR,
        );
        let statements = pgrx::PgList::<pg_sys::RawStmt>::from_pg(list);
        let (1, Some(statement)) = (statements.len(), statements.get_ptr(0)) else {
            return Err(plain());
        };
        let select: *mut pg_sys::SelectStmt = (*statement).stmt.cast();
        if (*select).type_ != pg_sys::NodeTag::T_SelectStmt {
            return Err(plain());
        }
        let lists = [
            (*select).distinctClause,
            (*select).fromClause,
            (*select).groupClause,
            (*select).windowClause,
            (*select).valuesLists,
            (*select).sortClause,
            (*select).lockingClause,
        ];
        let nodes = [
            (*select).whereClause,
            (*select).havingClause,
            (*select).limitOffset,
            (*select).limitCount,
        ];
        if lists.iter().any(|list| !list.is_null())
            || nodes.iter().any(|node| !node.is_null())
            || !(*select).intoClause.is_null()
            || !(*select).withClause.is_null()
            || (*select).op != pg_sys::SetOperation::SETOP_NONE
        {
            return Err(plain());
        }
        let targets = pgrx::PgList::<pg_sys::ResTarget>::from_pg((*select).targetList);
        match (targets.len(), targets.get_ptr(0)) {
            (1, Some(target)) if (*target).name.is_null() && !is_star((*target).val) => {
                Ok((*target).val)
            }
            _ => Err(plain()),
        }
    }
}

/// Whether a node of the raw grammar is `*` or ends in it: transformExpr relies on its caller to
/// have expanded that, and would take the star for a name.
///
/// # Safety
/// `node` is a node of the raw parser's.
unsafe fn is_star(node: *mut pg_sys::Node) -> bool {
    // SAFETY: promised by the caller; each cast follows the node's tag.
    unsafe {
        if (*node).type_ != pg_sys::NodeTag::T_ColumnRef {
            return false;
        }
        let fields = (*node.cast::<pg_sys::ColumnRef>()).fields;
        let fields = pgrx::PgList::<pg_sys::Node>::from_pg(fields);
        fields
            .iter_ptr()
            .any(|field| (*field).type_ == pg_sys::NodeTag::T_A_Star)
    }
}
