//! One expression: over a row, the context of a registered column or the source of a live one;
//! over a value, its normal form.
//!
//! Called by the registration, the triggers and src/worker/. Parsed as an index expression is, so
//! that subqueries, aggregates and set-returning functions are refused by the parser itself,
//! planned, and refused unless everything in it is IMMUTABLE. The caller has pinned the search path and
//! acts as the table's owner: the expression is the owner's code.

use std::ffi::c_void;

use pgrx::pg_sys::ffi::pg_guard_ffi_boundary;
use pgrx::{pg_guard, pg_sys};

use crate::error::{Error, Result};

/// A prepared expression; lives as long as the memory context it was made in.
pub struct Expression {
    state: *mut pg_sys::ExprState,
    context: *mut pg_sys::ExprContext,
    /// The type of its value.
    pub type_oid: pg_sys::Oid,
    /// The columns that one over a row reads; of a stored expression nobody asks.
    pub reads: Vec<i16>,
}

/// What an expression is for: its name and an example in messages, and its type.
#[derive(Clone, Copy)]
struct Use {
    name: &'static str,
    example: &'static str,
    /// Whether its value is text, whatever it begins as.
    is_text: bool,
}

const CONTEXT: Use = Use {
    name: "the context",
    example: "Give one expression over columns of the row, for example \
     rekey.context('customer.email', id::text).",
    is_text: true,
};
const SOURCE: Use = Use {
    name: "the source",
    example: "Give one expression over columns of the row, for example \
     convert_from(decrypt(email, key, 'aes'), 'UTF8').",
    is_text: false,
};
const NORMALISE: Use = Use {
    name: "normalise",
    example: "Give one expression over the value, $1, for example lower(btrim($1)).",
    is_text: true,
};

impl Use {
    fn refused(self, detail: &str) -> Error {
        self.refused_with(detail, self.example)
    }

    fn refused_with(self, detail: &str, hint: &str) -> Error {
        Error::Argument(
            format!("{} is not a usable expression", self.name),
            detail.to_string(),
            hint.to_string(),
        )
    }
}

// Functions that pgrx does not bind, or under this name not for every version. They may raise:
// called through pg_guard_ffi_boundary only.
unsafe extern "C-unwind" {
    // src/include/nodes/nodeFuncs.h
    #[cfg_attr(
        any(feature = "pg16", feature = "pg18"),
        link_name = "expression_tree_walker_impl"
    )]
    fn expression_tree_walker(
        node: *mut pg_sys::Node,
        walker: unsafe extern "C-unwind" fn(*mut pg_sys::Node, *mut c_void) -> bool,
        context: *mut c_void,
    ) -> bool;
}

impl Expression {
    /// Parses and plans a context over the columns of `relation`.
    pub fn prepare(relation: pg_sys::Relation, text: &str, sealed: &[i16]) -> Result<Expression> {
        Self::over_row(CONTEXT, relation, text, sealed)
    }

    /// Parses and plans the source of a live column.
    pub fn source(relation: pg_sys::Relation, text: &str, sealed: &[i16]) -> Result<Expression> {
        Self::over_row(SOURCE, relation, text, sealed)
    }

    fn over_row(
        purpose: Use,
        relation: pg_sys::Relation,
        text: &str,
        sealed: &[i16],
    ) -> Result<Expression> {
        let refused = |detail| purpose.refused(detail);
        // SAFETY: the steps of ComputeIndexAttrs and index_create for an expression; nodes live in
        // the current memory context, the relation is open and locked.
        unsafe {
            let (node, type_oid) = parse(purpose, text, |state| {
                let item = pg_sys::addRangeTableEntryForRelation(
                    state,
                    relation,
                    pg_sys::AccessShareLock as i32,
                    std::ptr::null_mut(),
                    false,
                    true,
                );
                pg_sys::addNSItemToQuery(state, item, true, true, true);
            })?;
            let planned = pg_sys::expression_planner(node);
            if pg_sys::contain_mutable_functions(planned.cast()) {
                return Err(purpose.refused_with(
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
                ));
            }
            if (low..=0).any(|system| pg_sys::bms_is_member(system - low, used)) {
                return Err(refused(
                    "It uses a system column or the whole row, which change with each update.",
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
                ));
            }
            Ok(Expression {
                state: pg_sys::ExecInitExpr(planned, std::ptr::null_mut()),
                context: pg_sys::CreateStandaloneExprContext(),
                type_oid,
                reads,
            })
        }
    }

    /// Parses and plans `text` over one value of type text, `$1`. Every function that it calls must
    /// belong to somebody who is `trusted` with the value; what such a function calls is his affair.
    pub fn over_value(
        text: &str,
        trusted: impl Fn(pg_sys::Oid) -> Result<bool>,
    ) -> Result<Expression> {
        // SAFETY: as in `prepare`; there is no column to name.
        unsafe {
            let (node, type_oid) = parse(NORMALISE, text, |state| {
                (*state).p_paramref_hook = Some(value_parameter);
            })?;
            // Before planning: that puts the bodies of SQL functions in the place of their calls.
            for function in functions_of(node)? {
                let trusted = match super::types::function_owner(function) {
                    Some(owner) => trusted(owner)?,
                    None => false,
                };
                if !trusted {
                    return Err(NORMALISE.refused_with(
                        "It calls a function of a role that may not decrypt the value.",
                        "Use PostgreSQL's own functions, those of a superuser, or of a role with \
                         the privilege decrypt on the key of the sealed values.",
                    ));
                }
            }
            let planned = pg_sys::expression_planner(node);
            if pg_sys::contain_mutable_functions(planned.cast()) {
                return Err(NORMALISE.refused(
                    "Not all of it is IMMUTABLE: the same value could give another one later.",
                ));
            }
            let context = pg_sys::CreateStandaloneExprContext();
            let values = pg_sys::makeParamList(1);
            let value = (*values).params.as_mut_ptr();
            (*value).ptype = pg_sys::TEXTOID;
            (*value).isnull = true;
            (*context).ecxt_param_list_info = values;
            Ok(Expression {
                state: pg_sys::ExecInitExpr(planned, std::ptr::null_mut()),
                context,
                type_oid,
                reads: Vec::new(),
            })
        }
    }

    /// An expression that PostgreSQL has stored, of any type.
    ///
    /// # Safety
    /// `node` is a parsed expression over one relation.
    pub unsafe fn of_node(node: *mut pg_sys::Node) -> Result<Expression> {
        // SAFETY: promised by the caller; the copy outlives the relation cache's entry.
        unsafe {
            let copy: *mut pg_sys::Expr = pg_sys::copyObjectImpl(node.cast()).cast();
            let planned = pg_sys::expression_planner(copy);
            Ok(Expression {
                state: pg_sys::ExecInitExpr(planned, std::ptr::null_mut()),
                context: pg_sys::CreateStandaloneExprContext(),
                type_oid: pg_sys::exprType(node),
                reads: Vec::new(),
            })
        }
    }

    /// The text for the row in `slot`, in UTF-8; None for NULL. Raises what the expression raises.
    pub fn evaluate(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Option<Vec<u8>>> {
        self.datum(slot)?.map(bytes_of).transpose()
    }

    /// The same as a datum of the expression's type, which lives until the next value is asked for.
    pub fn datum(&self, slot: *mut pg_sys::TupleTableSlot) -> Result<Option<pg_sys::Datum>> {
        // SAFETY: the slot holds a row of the relation that the expression was prepared for.
        unsafe {
            (*self.context).ecxt_scantuple = slot;
            self.run()
        }
    }

    /// The result for a text datum, in UTF-8; None for NULL. Raises what the expression raises.
    pub fn evaluate_over(&self, value: pg_sys::Datum) -> Result<Option<Vec<u8>>> {
        // SAFETY: prepared by `over_value`, which made the list of one parameter.
        let result = unsafe {
            let parameter = (*(*self.context).ecxt_param_list_info).params.as_mut_ptr();
            (*parameter).value = value;
            (*parameter).isnull = false;
            self.run()?
        };
        result.map(bytes_of).transpose()
    }

    /// # Safety
    /// The context holds what the expression was prepared for.
    unsafe fn run(&self) -> Result<Option<pg_sys::Datum>> {
        // SAFETY: promised by the caller. The evaluation function is called as ExecEvalExpr does,
        // under pgrx's guard.
        unsafe {
            pg_sys::MemoryContextReset((*self.context).ecxt_per_tuple_memory);
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

/// A text datum in UTF-8.
fn bytes_of(datum: pg_sys::Datum) -> Result<Vec<u8>> {
    let value = super::text::to_utf8(super::text::detoasted(datum))?;
    Ok(value.into_owned())
}

/// Parses and analyses an expression over what `names` lets it name; the type of its value.
///
/// # Safety
/// In a transaction; `names` leaves the state usable.
unsafe fn parse(
    purpose: Use,
    text: &str,
    names: impl FnOnce(*mut pg_sys::ParseState),
) -> Result<(*mut pg_sys::Expr, pg_sys::Oid)> {
    let server = super::text::to_server(text.as_bytes())?.into_owned();
    let source = std::ffi::CString::new(server).map_err(|_| purpose.refused("It has a NUL."))?;
    // SAFETY: nodes live in the current memory context.
    unsafe {
        let target = single_target(purpose, &source)?;
        let state = pg_sys::make_parsestate(std::ptr::null_mut());
        (*state).p_sourcetext = source.as_ptr();
        names(state);
        let kind = pg_sys::ParseExprKind::EXPR_KIND_INDEX_EXPRESSION;
        let raw = pg_sys::transformExpr(state, target, kind);
        let found = pg_sys::exprType(raw);
        // Strings of all types are sealed as text, as a call of encrypt_col would.
        let is_text =
            purpose.is_text || found == pg_sys::UNKNOWNOID || super::types::is_string(found);
        let wanted = if is_text { pg_sys::TEXTOID } else { found };
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
            return Err(purpose.refused("Its type cannot become text."));
        }
        pg_sys::assign_expr_collations(state, node);
        pg_sys::free_parsestate(state);
        Ok((node.cast(), wanted))
    }
}

/// Parser hook: `$1` is the value, there is no other parameter.
#[pg_guard]
unsafe extern "C-unwind" fn value_parameter(
    _state: *mut pg_sys::ParseState,
    reference: *mut pg_sys::ParamRef,
) -> *mut pg_sys::Node {
    // SAFETY: the parser passes a live node; the new one is zeroed and tagged as makeNode does. For
    // NULL the parser says that there is no such parameter.
    unsafe {
        if (*reference).number != 1 {
            return std::ptr::null_mut();
        }
        let parameter: *mut pg_sys::Param =
            pg_sys::palloc0(std::mem::size_of::<pg_sys::Param>()).cast();
        (*parameter).xpr.type_ = pg_sys::NodeTag::T_Param;
        (*parameter).paramkind = pg_sys::ParamKind::PARAM_EXTERN;
        (*parameter).paramid = 1;
        (*parameter).paramtype = pg_sys::TEXTOID;
        (*parameter).paramtypmod = -1;
        (*parameter).paramcollid = pg_sys::Oid::from(100); // DEFAULT_COLLATION_OID
        (*parameter).location = (*reference).location;
        parameter.cast()
    }
}

/// The functions that an analysed expression calls itself, by operators, casts and types too.
///
/// # Safety
/// `node` is an analysed expression.
unsafe fn functions_of(node: *mut pg_sys::Expr) -> Result<Vec<pg_sys::Oid>> {
    struct Found {
        functions: Vec<pg_sys::Oid>,
        domain: bool,
    }
    #[pg_guard]
    unsafe extern "C-unwind" fn note(function: pg_sys::Oid, context: *mut c_void) -> bool {
        // SAFETY: the context is the one that `functions_of` passes.
        unsafe { (*context.cast::<Found>()).functions.push(function) };
        false
    }
    #[pg_guard]
    unsafe extern "C-unwind" fn visit(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
        if node.is_null() {
            return false;
        }
        // SAFETY: a walker of nodeFuncs.c: it is called with each node and goes on below it.
        unsafe {
            if (*node).type_ == pg_sys::NodeTag::T_CoerceToDomain {
                (*context.cast::<Found>()).domain = true;
            }
            pg_sys::check_functions_in_node(node, Some(note), context);
            pg_guard_ffi_boundary(|| expression_tree_walker(node, visit, context))
        }
    }
    let mut found = Found {
        functions: Vec::new(),
        domain: false,
    };
    // SAFETY: promised by the caller.
    unsafe { visit(node.cast(), (&raw mut found).cast()) };
    if found.domain {
        return Err(NORMALISE.refused("It uses a domain, whose constraints are code as well."));
    }
    Ok(found.functions)
}

/// The one plain expression that the text consists of.
///
/// # Safety
/// In a transaction.
unsafe fn single_target(purpose: Use, source: &std::ffi::CStr) -> Result<*mut pg_sys::Node> {
    let plain = || purpose.refused("It is more than one plain expression.");
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
